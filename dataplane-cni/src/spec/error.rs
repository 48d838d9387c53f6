//! Errors of a CNI command, in the form the specification defines.

use std::{fmt, io};

use serde_json::json;

use super::{Version, environment::Command};
use crate::protocol::code;

/// Why the plugin refuses a command before it calls the agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cniVersion {found} is not supported; supported versions: {}", Version::list())]
    Version { found: String },
    #[error("{command} requires cniVersion {since} or later; the network configuration has {found}")]
    TooOld { found: Version, command: Command, since: Version },
    /// Invalid environment variable.
    #[error("{name} {problem}")]
    Environment { name: &'static str, problem: String },
    #[error("cannot read the network configuration from stdin: {0}")]
    Stdin(String),
    #[error("network configuration: {0}")]
    Decode(String),
    /// Invalid key of the configuration.
    #[error("network configuration: {key}: {problem}")]
    Config { key: &'static str, problem: String },
}

impl Error {
    pub fn stdin(error: &io::Error) -> Self {
        Self::Stdin(error.to_string())
    }

    const fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::TooOld { .. } => 1,
            Self::Environment { .. } => code::ENVIRONMENT,
            Self::Stdin(_) => code::IO,
            Self::Decode(_) => code::DECODE,
            Self::Config { .. } => 7,
        }
    }
}

/// The error result that is written to stdout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorResult {
    /// Version of the network configuration, or the newest one if it could not be read.
    pub version: Version,
    pub code: u32,
    pub message: String,
    pub details: String,
}

impl ErrorResult {
    /// An error result where the version is not known.
    #[expect(clippy::needless_pass_by_value, reason = "for use with map_err")]
    pub fn new(error: Error) -> Self {
        Self::of(Version::NEWEST, &error)
    }

    pub fn of(version: Version, error: &Error) -> Self {
        Self { version, code: error.code(), message: error.to_string(), details: String::new() }
    }
}

impl fmt::Display for ErrorResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, code, message, details } = self;
        let mut result = json!({ "cniVersion": version.as_str(), "code": code, "msg": message });
        if !details.is_empty() {
            result["details"] = json!(details);
        }
        write!(f, "{result}")
    }
}
