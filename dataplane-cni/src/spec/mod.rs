//! The Container Network Interface as its specification has it, versions 0.3.1 to 1.1.0.
//!
//! Environment and configuration in, results and errors out. Knows no agent.

mod config;
mod environment;
mod error;
mod result;
mod runtime;
mod version;

pub use config::{Config, GcConfig};
pub use environment::{Command, Environment, Target};
pub use error::{Error, Report};
pub use result::{AddResult, PreviousDevice, Versions};
pub use version::Version;
