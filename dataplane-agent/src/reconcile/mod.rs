//! Desired against actual: the one owner of what stands in the datapath's tables.

pub mod backoff;
pub mod counted;
pub mod slots;
