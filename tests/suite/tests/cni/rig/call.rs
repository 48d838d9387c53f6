//! One call of the plugin.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use dataplane_testkit::bins;

/// What the plugin is called with.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) environment: Vec<(&'static str, String)>,
    pub(crate) config: Value,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) success: bool,
    /// `null` if nothing was printed.
    pub(crate) stdout: Value,
}

impl Call {
    /// A call with the configuration a runtime would read from its directory, in a version.
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

    /// With an environment variable. An empty one is as good as none.
    #[must_use]
    pub(crate) fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.retain(|(set, _)| *set != name);
        self.environment.push((name, value.into()));
        self
    }

    /// With a key of the configuration.
    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config[key] = value.into();
        self
    }

    /// Calls.
    pub(crate) fn run(&self) -> Result<Outcome> {
        run(&bins::cni()?, &self.environment, self.config.to_string().as_bytes())
    }

    /// Calls, and expects success.
    pub(crate) fn ok(&self) -> Result<Value> {
        let Outcome { success, stdout } = self.run()?;
        if !success {
            bail!("{:?}: {stdout}", self.environment);
        }
        Ok(stdout)
    }

    /// Calls, and expects an error as the specification wants it. Its code and message.
    pub(crate) fn refused(&self) -> Result<(u64, String)> {
        self.run()?.error(self.config["cniVersion"].as_str())
    }
}

impl Outcome {
    /// Code and message of an error in a version, if that can be told.
    pub(crate) fn error(&self, version: Option<&str>) -> Result<(u64, String)> {
        let Self { success, stdout } = self;
        ensure!(!success, "a call that was to fail succeeded: {stdout}");
        if let Some(version) = version {
            ensure!(stdout["cniVersion"] == version, "an error in another version than {version}: {stdout}");
        }
        let code = stdout["code"].as_u64().with_context(|| format!("an error without a code: {stdout}"))?;
        let message = stdout["msg"].as_str().with_context(|| format!("an error without msg: {stdout}"))?;
        Ok((code, message.to_owned()))
    }
}

/// Calls the plugin with any bytes.
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
        // it refused the call before it read all of it
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => drop(stdin),
    }
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(stderr.is_empty(), "the plugin complains: {stderr}");
    let stdout = if output.stdout.is_empty() {
        Value::Null
    } else {
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text).with_context(|| format!("stdout of the plugin: {text:?}"))?
    };
    Ok(Outcome { success: output.status.success(), stdout })
}
