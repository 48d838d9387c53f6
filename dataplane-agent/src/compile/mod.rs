//! From objects to the entries they mean. Pure: same input, same output, no clock, no table, no kernel.

pub mod endpoints;
pub mod host_ports;
pub mod routes;
pub mod services;
