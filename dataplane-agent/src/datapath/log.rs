//! Forwards the programs' log from aya-log to tracing, for debugging. Off by default: the verifier
//! removes the log calls.

use std::{io, str::FromStr};

use aya::programs::{Program, ProgramError};
use aya_log::EbpfLogger;
use dataplane_common::abi::names::program;
use tokio::task::JoinHandle;
use tracing_log::LogTracer;

use super::{events::async_fd, loader::Datapath};

/// Log level of the programs. Log calls of other levels are not in the loaded program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum EbpfLog {
    #[default]
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// An unknown log level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log level {0:?} is not one of off, error, warn, info, debug, trace")]
pub struct UnknownLevel(String);

/// Why the programs' log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("open the log of the programs: {0}")]
    Open(#[from] aya_log::Error),
    #[error("poll the log of the programs: {0}")]
    Watch(#[from] io::Error),
}

impl EbpfLog {
    /// The value of `AYA_LOG_LEVEL` in the object.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl FromStr for EbpfLog {
    type Err = UnknownLevel;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return Err(UnknownLevel(text.to_owned())),
        })
    }
}

impl Datapath {
    /// Starts forwarding the programs' log to `tracing`. The datapath must be loaded with a level
    /// other than off.
    ///
    /// # Errors
    ///
    /// The object has no log map (no log call), or the task cannot poll it.
    pub fn forward_log(&self) -> Result<JoinHandle<()>, LogError> {
        // the map is the same for all programs
        let program = self.programs.get(program::FROM_POD).ok_or(ProgramError::NotLoaded);
        let program = program.and_then(Program::info).map_err(aya_log::Error::from)?;
        let logger = EbpfLogger::init_from_id_with_logger(program.id(), LogTracer::new())?;
        let mut logger = async_fd(logger)?;
        Ok(tokio::spawn(async move {
            while let Ok(mut guard) = logger.readable_mut().await {
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_numbers_are_those_of_aya_log() {
        assert_eq!(EbpfLog::Error.number(), aya_log::Level::Error as u8);
        assert_eq!(EbpfLog::Trace.number(), aya_log::Level::Trace as u8);
        assert!(EbpfLog::Off.number() < aya_log::Level::Error as u8);
    }

    #[test]
    fn unknown_level_is_refused() {
        assert_eq!("debug".parse(), Ok(EbpfLog::Debug));
        assert!("verbose".parse::<EbpfLog>().is_err());
    }
}
