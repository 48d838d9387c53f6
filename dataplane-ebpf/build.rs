//! Rebuilds the object when bpf-linker changes: cargo does not know of a linker it did not build.

fn main() {
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
}
