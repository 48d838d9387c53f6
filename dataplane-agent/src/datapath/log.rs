//! aya-log → tracing: what the programs say while they are debugged. Off, and pruned by the verifier, by default.

use std::{io, str::FromStr};

use aya_log::EbpfLogger;
use tokio::task::JoinHandle;
use tracing_log::LogTracer;

use super::{events::when_readable, loader::Datapath};

/// From which level the programs log. What is below is not in the loaded program at all.
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

/// Not a level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log level {0:?} is none of off, error, warn, info, debug, trace")]
pub struct UnknownLevel(String);

/// Why the programs' log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("open the log of the programs: {0}")]
    Open(#[from] aya_log::Error),
    #[error("watch the log of the programs: {0}")]
    Watch(#[from] io::Error),
}

impl EbpfLog {
    /// As `AYA_LOG_LEVEL` in the object counts them.
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
    /// Starts forwarding what the programs log to `tracing`. For a datapath loaded with a level other than off.
    ///
    /// # Errors
    ///
    /// The object has no log (it was built without a log statement), or the task cannot watch it.
    pub fn forward_log(&mut self) -> Result<JoinHandle<()>, LogError> {
        let logger = EbpfLogger::init_with_logger(&mut self.ebpf, LogTracer::new())?;
        let mut logger = when_readable(logger)?;
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
    fn levels_count_as_aya_counts_them() {
        assert_eq!(EbpfLog::Error.number(), aya_log::Level::Error as u8);
        assert_eq!(EbpfLog::Trace.number(), aya_log::Level::Trace as u8);
        assert!(EbpfLog::Off.number() < aya_log::Level::Error as u8);
    }

    #[test]
    fn a_level_that_is_none_is_refused() {
        assert_eq!("debug".parse(), Ok(EbpfLog::Debug));
        assert!("verbose".parse::<EbpfLog>().is_err());
    }
}
