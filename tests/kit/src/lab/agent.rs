//! The agent of a node: its configuration, its process, its local API.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use dataplane_agent::api::{
    request::{EventLine, View},
    views::StatusView,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    process::{Place, Process, tail},
    wait,
};
use crate::bins;

/// Timeout for an agent to become ready or to apply a change. The verifier takes seconds for each
/// node of the cluster, all at once, on a machine that may be busy.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The agent of a node, running or stopped.
#[derive(Debug)]
pub struct Agent {
    place: Place,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    wrapper: Vec<String>,
    process: Option<Process>,
}

impl Agent {
    /// Writes the configuration; starts nothing.
    pub(super) fn new(place: Place, directory: &Path, config: &Value) -> Result<Self> {
        let agent = Self {
            place,
            config: directory.join("agent.yaml"),
            socket: directory.join("run/agent.sock"),
            log: directory.join("agent.log"),
            wrapper: Vec::new(),
            process: None,
        };
        fs::write(&agent.config, serde_norway::to_string(config)?)?;
        Ok(agent)
    }

    /// Replaces the configuration file, as editors do.
    pub fn change_config(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut config: Value = serde_norway::from_str(&fs::read_to_string(&self.config)?)?;
        change(&mut config);
        let draft = self.config.with_extension("draft");
        fs::write(&draft, serde_norway::to_string(&config)?)?;
        Ok(fs::rename(draft, &self.config)?)
    }

    pub fn start(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("the agent of {} is already running", self.place.namespace().name());
        }
        let config = self.config.to_str().context("a path that is not UTF-8")?;
        let agent = bins::agent()?;
        let agent = agent.to_str().context("a path that is not UTF-8")?;
        let command = self.wrapper.iter().map(String::as_str).chain([agent, "run", "--config", config]);
        let command: Vec<&str> = command.collect();
        self.process = Some(self.place.daemon(command[0], &command[1..], &self.log)?);
        Ok(())
    }

    /// From the next start on, runs the agent under this program, which drops a privilege or limits
    /// a resource first.
    pub fn set_wrapper(&mut self, program: Vec<String>) {
        self.wrapper = program;
    }

    /// Waits until the agent reports that it is ready.
    pub fn await_ready(&mut self) -> Result<StatusView> {
        self.until("ready agent", |agent| {
            let status = agent.status()?;
            match status.status.not_ready.first() {
                None => Ok(Some(status)),
                Some(not_ready) => Err(anyhow!("not ready: {}: {}", not_ready.check, not_ready.reason)),
            }
        })
    }

    /// Waits for `condition`. Fails at once if the agent ends; errors contain the end of its log.
    pub fn until<T>(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let waited = wait::until(what, TIMEOUT, || {
            if let Some(process) = &mut self.process
                && let Err(error) = process.check_running()
            {
                return Ok(Some(Err(error)));
            }
            condition(self).map(|found| found.map(Ok))
        });
        waited.with_context(|| format!("log of the agent:\n{}", self.log_tail()))?
    }

    /// Ends the agent with SIGKILL, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the agent does not run")?.kill()
    }

    /// Ends the agent with SIGTERM, as a service manager does.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.take().context("the agent does not run")?.terminate(TIMEOUT)
    }

    /// Leaves the agent running when this process ends.
    pub(super) fn detach(&mut self) {
        if let Some(process) = self.process.take() {
            process.detach();
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn log_tail(&self) -> String {
        tail(&self.log, 25)
    }

    /// The output of `dataplane-agent status -o json`.
    pub fn status(&self) -> Result<StatusView> {
        self.ask(&View::Status)
    }

    /// Requests a view.
    pub fn ask<T: DeserializeOwned>(&self, view: &View) -> Result<T> {
        let mut response: Value = serde_json::from_str(&self.exchange(&serde_json::to_string(view)?)?)?;
        match response.get_mut("result") {
            Some(result) => Ok(serde_json::from_value(result.take())?),
            None => bail!("the agent returned an error: {response}"),
        }
    }

    /// The events recorded so far.
    pub fn stream(&self, view: &View) -> Result<Vec<EventLine>> {
        let mut stream = self.send(&serde_json::to_string(view)?)?;
        let mut lines = Vec::new();
        let mut text = String::new();
        while stream.read_line(&mut text).context("read the agent's response")? != 0 {
            match serde_json::from_str(&text)? {
                EventLine::End => break,
                line => lines.push(line),
            }
            text.clear();
        }
        Ok(lines)
    }

    /// Sends one line and returns the response line.
    pub fn exchange(&self, line: &str) -> Result<String> {
        let mut response = String::new();
        self.send(line)?.read_line(&mut response).context("read the agent's response")?;
        Ok(response)
    }

    fn send(&self, line: &str) -> Result<BufReader<UnixStream>> {
        let stream = UnixStream::connect(&self.socket).with_context(|| self.socket.display().to_string())?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut stream = BufReader::new(stream);
        writeln!(stream.get_mut(), "{line}")?;
        Ok(stream)
    }
}
