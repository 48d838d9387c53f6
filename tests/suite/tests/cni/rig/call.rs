//! One call of the plugin.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use dataplane_testkit::bins;

/// Environment and configuration of a call.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) environment: Vec<(&'static str, String)>,
    pub(crate) config: Value,
}

/// Result of a call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) success: bool,
    /// `null` if nothing was printed.
    pub(crate) stdout: Value,
}

impl Call {
    /// A call with a network configuration of this version.
    pub(crate) fn new(command: &str, socket: &Path, version: &str) -> Self {
        Self {
            environment: vec![("CNI_COMMAND", command.to_owned()), ("CNI_PATH", "/opt/cni/bin".to_owned())],
            config: json!({
                "cniVersion": version,
                "name": "pods",
                "type": "dataplane-cni",
                "agentSocket": socket,
                "capabilities": {"portMappings": true},
            }),
        }
    }

    /// Sets an environment variable; an empty one counts as missing.
    #[must_use]
    pub(crate) fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.retain(|(set, _)| *set != name);
        self.environment.push((name, value.into()));
        self
    }

    /// Sets a key of the configuration.
    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config[key] = value.into();
        self
    }

    /// Runs the plugin.
    pub(crate) fn run(&self) -> Result<Outcome> {
        run(&bins::cni()?, &self.environment, self.config.to_string().as_bytes())
    }

    /// Runs the plugin; returns its result.
    pub(crate) fn ok(&self) -> Result<Value> {
        let Outcome { success, stdout } = self.run()?;
        if !success {
            bail!("{:?}: {stdout}", self.environment);
        }
        Ok(stdout)
    }

    /// Runs the plugin; returns code and message of its error.
    pub(crate) fn error(&self) -> Result<(u64, String)> {
        self.run()?.error(self.config["cniVersion"].as_str())
    }
}

impl Outcome {
    /// Code and message of an error, which must be of `version`, if given.
    pub(crate) fn error(&self, version: Option<&str>) -> Result<(u64, String)> {
        let Self { success, stdout } = self;
        ensure!(!success, "the call succeeded: {stdout}");
        if let Some(version) = version {
            ensure!(stdout["cniVersion"] == version, "error is not of version {version}: {stdout}");
        }
        let code = stdout["code"].as_u64().with_context(|| format!("error without a code: {stdout}"))?;
        let message = stdout["msg"].as_str().with_context(|| format!("error without msg: {stdout}"))?;
        Ok((code, message.to_owned()))
    }
}

/// Runs the plugin with any bytes on stdin.
pub(crate) fn run(plugin: &PathBuf, environment: &[(&str, String)], config: &[u8]) -> Result<Outcome> {
    let mut child = Command::new(plugin)
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (*name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| plugin.display().to_string())?;
    let mut stdin = child.stdin.take().context("the plugin has no stdin")?;
    match stdin.write_all(config) {
        // the plugin failed before it read all of stdin
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => drop(stdin),
    }
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(stderr.is_empty(), "the plugin printed to stderr: {stderr}");
    let stdout = if output.stdout.is_empty() {
        Value::Null
    } else {
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text).with_context(|| format!("stdout of the plugin: {text:?}"))?
    };
    Ok(Outcome { success: output.status.success(), stdout })
}
