//! Shared by tests, demo and benchmark: packets through the loaded programs, clusters of network
//! namespaces, and traffic in them.

pub mod apiserver;
pub mod bins;
pub mod lab;
pub mod prog;
pub mod run;
pub mod sys_bpf;
pub mod traffic;
