//! Small eBPF programs that the benchmark generates at run time: an [`assembly`], the commands of
//! the [`kernel`] to load, attach and run them, and the simplest [`programs`].

pub(crate) mod assembly;
pub(crate) mod kernel;
pub(crate) mod programs;
