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

/// How long an agent may take to be ready, and to take up a change. The kernel verifies programs for seconds, for every
/// node of a cluster at once, on a machine that may have other things to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// What runs, or has run, as the agent of a node.
#[derive(Debug)]
pub struct Agent {
    place: Place,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    under: Vec<String>,
    process: Option<Process>,
}

impl Agent {
    /// Writes its configuration; starts nothing.
    pub(super) fn new(place: Place, directory: &Path, config: &Value) -> Result<Self> {
        let agent = Self {
            place,
            config: directory.join("agent.yaml"),
            socket: directory.join("run/agent.sock"),
            log: directory.join("agent.log"),
            under: Vec::new(),
            process: None,
        };
        fs::write(&agent.config, serde_norway::to_string(config)?)?;
        Ok(agent)
    }

    pub fn start(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("the agent of {} runs already", self.place.namespace().name());
        }
        let config = self.config.to_str().context("a path that is not UTF-8")?;
        let agent = bins::agent()?;
        let agent = agent.to_str().context("a path that is not UTF-8")?;
        let words = self.under.iter().map(String::as_str).chain([agent, "run", "--config", config]);
        let words: Vec<&str> = words.collect();
        self.process = Some(self.place.daemon(words[0], &words[1..], &self.log)?);
        Ok(())
    }

    /// From the next start on, this program starts it: one that takes something away from it first.
    pub fn start_under(&mut self, program: Vec<String>) {
        self.under = program;
    }

    /// Waits until it says that it is ready.
    pub fn await_ready(&mut self) -> Result<StatusView> {
        self.until("ready agent", |agent| {
            let status = agent.status()?;
            match status.status.not_ready.first() {
                None => Ok(Some(status)),
                Some(not_ready) => Err(anyhow!("not ready: {}: {}", not_ready.check, not_ready.reason)),
            }
        })
    }

    /// Waits for something this agent does; its end, and the end of its log, if it does not.
    pub fn until<T>(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let waited = wait::until(what, PATIENCE, || {
            if let Some(process) = &mut self.process
                && let Err(error) = process.check_running()
            {
                return Ok(Some(Err(error)));
            }
            condition(self).map(|found| found.map(Ok))
        });
        waited.with_context(|| format!("log of the agent:\n{}", self.log_tail()))?
    }

    /// As a crash ends it: without a word.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the agent does not run")?.kill()
    }

    /// As a service manager ends it.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.take().context("the agent does not run")?.terminate(PATIENCE)
    }

    /// Lets it run when we end.
    pub(super) fn leave(&mut self) {
        if let Some(process) = self.process.take() {
            process.leave();
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

    /// What `dataplane-agent status -o json` shows.
    pub fn status(&self) -> Result<StatusView> {
        self.ask(&View::Status)
    }

    /// Asks for a view.
    pub fn ask<T: DeserializeOwned>(&self, view: &View) -> Result<T> {
        let mut answer: Value = serde_json::from_str(&self.exchange(&serde_json::to_string(view)?)?)?;
        match answer.get_mut("result") {
            Some(result) => Ok(serde_json::from_value(result.take())?),
            None => bail!("the agent answers: {answer}"),
        }
    }

    /// The events there are now.
    pub fn stream(&self, view: &View) -> Result<Vec<EventLine>> {
        let mut stream = self.send(&serde_json::to_string(view)?)?;
        let mut lines = Vec::new();
        let mut text = String::new();
        while stream.read_line(&mut text).context("read the agent's answer")? != 0 {
            match serde_json::from_str(&text)? {
                EventLine::End => break,
                line => lines.push(line),
            }
            text.clear();
        }
        Ok(lines)
    }

    /// One line there, one line back.
    pub fn exchange(&self, line: &str) -> Result<String> {
        let mut answer = String::new();
        self.send(line)?.read_line(&mut answer).context("read the agent's answer")?;
        Ok(answer)
    }

    fn send(&self, line: &str) -> Result<BufReader<UnixStream>> {
        let stream = UnixStream::connect(&self.socket).with_context(|| self.socket.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut stream = BufReader::new(stream);
        writeln!(stream.get_mut(), "{line}")?;
        Ok(stream)
    }
}
