//! What is wrong with a call, in the form the specification asks for.

use std::{fmt, io};

use serde_json::json;

use super::{Version, environment::Command};
use crate::protocol::code;

/// Why a call is refused before the agent is asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cniVersion {found} is not supported; supported are {}", Version::list())]
    Version { found: String },
    #[error("cniVersion {found} has no {command}: it came with {since}")]
    TooOld { found: Version, command: Command, since: Version },
    /// An environment variable.
    #[error("{name} {problem}")]
    Environment { name: &'static str, problem: String },
    #[error("read the network configuration from stdin: {0}")]
    Stdin(String),
    #[error("network configuration: {0}")]
    Decode(String),
    /// A key of the configuration.
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

/// An error as it is written to stdout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// In the version of the call, if that much could be read.
    pub version: Version,
    pub code: u32,
    pub message: String,
    pub details: String,
}

impl Report {
    /// Of a call whose version is not known.
    #[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
    pub fn new(error: Error) -> Self {
        Self::of(Version::NEWEST, &error)
    }

    pub fn of(version: Version, error: &Error) -> Self {
        Self { version, code: error.code(), message: error.to_string(), details: String::new() }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, code, message, details } = self;
        let mut report = json!({ "cniVersion": version.as_str(), "code": code, "msg": message });
        if !details.is_empty() {
            report["details"] = json!(details);
        }
        write!(f, "{report}")
    }
}
