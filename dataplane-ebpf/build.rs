//! What the linker is to know, and that it may change.

fn main() {
    // Fills and overlapping copies are written out like any other copy, as the back end does by
    // itself. Told to copy in order, as it is by default, it leaves them to functions that go byte
    // by byte: five instructions a byte, to run and to verify.
    println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    // cargo does not know of a linker it did not build
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
}
