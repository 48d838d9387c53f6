//! Sets up logging: a `tracing` subscriber on stderr, and a bridge for crates that use `log` (aya,
//! aya-log, rtnetlink).

use std::{io, str::FromStr};

use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use tracing_log::LogTracer;
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt, util::SubscriberInitExt};

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

/// Error while logging is set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("invalid log filter {filter:?}: {source}")]
    Filter { filter: String, source: ParseError },
    #[error("cannot install the logger: another one is installed already")]
    Installed,
}

/// An unknown log format.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown log format {0:?}: must be text or json")]
pub struct UnknownFormat(String);

impl FromStr for LogFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// Starts logging. `filter` is `info`, `dataplane_agent::reconcile=debug,info`, ...
pub fn init(filter: &str, format: LogFormat) -> Result<(), TelemetryError> {
    let filter = parse(filter)?;
    // disabled levels are dropped by `log` before they are formatted
    let level = filter.max_level_hint().unwrap_or(LevelFilter::TRACE);
    LogTracer::builder()
        .with_max_level(as_log_level(level))
        .init()
        .map_err(|_set| TelemetryError::Installed)?;
    let builder = fmt().with_env_filter(filter).with_writer(io::stderr);
    let installed = match format {
        LogFormat::Text => builder.with_ansi(is_terminal()).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    };
    installed.map_err(|_set| TelemetryError::Installed)
}

fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(filter).map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })
}

fn is_terminal() -> bool {
    io::IsTerminal::is_terminal(&io::stderr())
}

fn as_log_level(level: LevelFilter) -> tracing_log::log::LevelFilter {
    use tracing_log::log::LevelFilter as Log;
    match level {
        LevelFilter::OFF => Log::Off,
        LevelFilter::ERROR => Log::Error,
        LevelFilter::WARN => Log::Warn,
        LevelFilter::INFO => Log::Info,
        LevelFilter::DEBUG => Log::Debug,
        _ => Log::Trace,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_filter_is_refused_and_named() {
        let error = parse("dataplane_agent=loud").unwrap_err();
        assert!(error.to_string().contains("dataplane_agent=loud"), "{error}");
        assert!(parse("dataplane_agent::reconcile=debug,info").is_ok());
    }

    #[test]
    fn unknown_format_is_refused() {
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert_eq!("xml".parse::<LogFormat>(), Err(UnknownFormat("xml".to_owned())));
    }

    #[test]
    fn lines_of_the_log_crate_reach_the_subscriber() {
        init("info", LogFormat::Text).unwrap();
        assert!(tracing_log::log::max_level() >= tracing_log::log::LevelFilter::Info);
        assert!(matches!(init("info", LogFormat::Json), Err(TelemetryError::Installed)));
    }
}
