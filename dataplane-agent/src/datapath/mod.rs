//! The loaded programs and their maps: the only place that knows aya.

pub mod table;
