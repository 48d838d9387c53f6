//! Small eBPF programs that the benchmark generates at run time: an [`assembly`], and the commands
//! of the [`kernel`] to load, attach and run them.

pub(crate) mod assembly;
pub(crate) mod kernel;
