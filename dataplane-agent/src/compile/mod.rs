//! Compiles objects to the desired table entries. Pure: no clock, no table, no kernel.

pub mod endpoints;
pub mod host_ports;
pub mod prefixes;
pub mod routes;
pub mod services;
