//! Options for `bpf-linker`, and a rebuild when it changes.

fn main() {
    // Expands fills and overlapping copies inline, as the back end does with other copies. By
    // default the linker leaves them to functions that copy byte by byte: five instructions a byte
    // to run and verify.
    println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    // cargo does not track a linker that it did not build
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
}
