//! The CNI specification, versions 0.3.1 to 1.1.0.
//!
//! Parses environment and configuration, and encodes results and errors. Knows nothing of the
//! agent.

mod config;
mod environment;
mod error;
mod result;
mod runtime;
mod version;

pub use config::{Config, GcConfig};
pub use environment::{Command, Environment, Target};
pub use error::{Error, ErrorResult};
pub use result::{AddResult, PreviousDevice, VersionResult};
pub use version::Version;
