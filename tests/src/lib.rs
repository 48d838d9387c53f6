//! Proof across crates: packets through the loaded programs, and clusters of network namespaces.

pub mod apiserver;
pub mod bench;
pub mod bins;
pub mod cni;
pub mod demo;
pub mod deploy;
pub mod kernel;
pub mod lab;
pub mod oracle;
pub mod prog;
mod sys_bpf;
pub mod traffic;
