//! The benchmark: our datapath beside what it replaces and beside the limit, in one interleaved run.
//!
//! [`load`] makes the traffic and [`stats`] turns rounds into ratios with an interval. Numbers of different runs never
//! meet: only ratios inside one run mean anything here.

pub mod load;
pub mod stats;
