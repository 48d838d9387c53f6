//! `allocate`: gives each node its ranges of pod addresses, on clusters that do not.

pub mod book;
pub mod lease;
pub mod pool;
