//! Traffic from and to a place, by `dataplane-traffic` and `ping`, and its results.

use std::{
    collections::BTreeMap,
    io::Write as _,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;

use super::{
    objects::distribution,
    process::{Place, Process},
    wait,
};
use crate::{
    bins,
    traffic::report::{
        Datagrams, Echo, HeldConnections, Outcome, Probe, ProbeResult, Ready, Request, Resolved,
    },
};

/// Timeout for a tool to start; it may open a thousand connections.
const START: Duration = Duration::from_secs(30);
/// Timeout for a tool to end, including its own timeout.
const END: Duration = Duration::from_secs(30);

/// A client that runs until it is stopped, and then reports.
#[derive(Debug)]
pub struct Client<T> {
    process: Process,
    report: PhantomData<T>,
}

impl<T: DeserializeOwned> Client<T> {
    /// Stops the client and returns its report.
    pub fn finish(self) -> Result<T> {
        let lines = self.process.finish(END)?;
        let line = lines.last().context("the client printed no report")?;
        serde_json::from_str(line).with_context(|| format!("a client's report: {line}"))
    }

    pub fn check_running(&mut self) -> Result<()> {
        self.process.check_running()
    }
}

impl Client<Datagrams> {
    /// Waits for an echo of `server` to a datagram that was sent after `after_us` (a time of
    /// [`crate::traffic::now_us`]). The client must run with `--each`.
    pub fn wait_echo(&self, server: &str, after_us: u64, deadline: Duration) -> Result<Echo> {
        let matches = |echo: &Echo| echo.server == server && echo.sent_us > after_us;
        let waited = self.process.wait_line(deadline, |line| serde_json::from_str(line).ok().filter(matches));
        waited.with_context(|| format!("wait for an echo of {server}"))
    }

    /// Stops the client and returns every echo and the report. The client must run with `--each`.
    pub fn finish_each(self) -> Result<(Vec<Echo>, Datagrams)> {
        let lines = self.process.finish(END)?;
        let (report, echoes) = lines.split_last().context("the client printed no report")?;
        // the first line is `Ready`
        let echoes = echoes.iter().skip(1).map(|line| serde_json::from_str(line).context("an echo"));
        Ok((echoes.collect::<Result<_>>()?, serde_json::from_str(report).context("a client's report")?))
    }
}

impl Client<Vec<Request>> {
    /// The requests completed so far.
    pub fn so_far(&self) -> Result<Vec<Request>> {
        requests(&self.process.lines())
    }

    /// Waits for a request that is `wanted`.
    pub fn wait(&self, deadline: Duration, wanted: impl Fn(&Request) -> bool) -> Result<Request> {
        self.process
            .wait_line(deadline, |line| serde_json::from_str(line).ok().filter(|request| wanted(request)))
    }

    /// Waits for `count` responses to requests that began after `after_us` (a time of
    /// [`crate::traffic::now_us`]).
    pub fn wait_answers(&self, count: usize, after_us: u64, deadline: Duration) -> Result<()> {
        wait::until("answers", deadline, || {
            let since = self.so_far()?.iter().filter(|request| request.began_us > after_us).count();
            Ok((since >= count).then_some(()))
        })
    }

    /// Stops the client and returns all its requests.
    pub fn stop(self) -> Result<Vec<Request>> {
        requests(&self.process.finish(END)?)
    }
}

/// The summary of `ping`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    pub sent: u32,
    pub received: u32,
}

impl Place {
    /// Starts a server that responds with its `name`, on the default ports of `dataplane-traffic
    /// serve`.
    pub fn serve(&self, name: &str) -> Result<Process> {
        self.start_traffic(&["serve", "--name", name])
    }

    /// As [`Self::serve`]; also answers SCTP INITs, through raw sockets.
    pub fn serve_raw_sctp(&self, name: &str) -> Result<Process> {
        self.start_traffic(&["serve", "--name", name, "--raw-sctp"])
    }

    /// Starts `dataplane-traffic` and waits until it is ready.
    pub fn start_traffic(&self, arguments: &[&str]) -> Result<Process> {
        let process = self.start(bins::traffic()?, arguments)?;
        process.wait_line(START, |line| serde_json::from_str::<Ready>(line).ok())?;
        Ok(process)
    }

    /// Sends `count` HTTP requests, one after the other.
    pub fn get(&self, server: SocketAddr, count: u32) -> Result<Vec<Request>> {
        self.get_bytes(server, count, 0)
    }

    /// As [`Self::get`], with bodies of this size.
    pub fn get_bytes(&self, server: SocketAddr, count: u32, bytes: usize) -> Result<Vec<Request>> {
        self.requests(server, count, bytes, &[])
    }

    /// As [`Self::get`], from this source address.
    pub fn get_from(&self, server: SocketAddr, count: u32, from: IpAddr) -> Result<Vec<Request>> {
        self.requests(server, count, 0, &["--from", &from.to_string()])
    }

    /// As [`Self::get_bytes`], over SCTP with an association per request.
    pub fn get_over_sctp(&self, server: SocketAddr, count: u32, bytes: usize) -> Result<Vec<Request>> {
        self.requests(server, count, bytes, &["--sctp"])
    }

    fn requests(&self, server: SocketAddr, count: u32, bytes: usize, more: &[&str]) -> Result<Vec<Request>> {
        let (server, count, bytes) = (server.to_string(), count.to_string(), bytes.to_string());
        let arguments = ["http", &server, "--count", &count, "--bytes", &bytes];
        let text = self.run(bins::traffic()?, &[&arguments, more].concat())?;
        text.lines().map(|line| serde_json::from_str(line).context("a client's line")).collect()
    }

    /// Sends `count` HTTP requests and checks each response: from the server `name` (any, if
    /// `None`), which saw the client as `seen_as`.
    pub fn get_as(&self, server: SocketAddr, count: u32, name: Option<&str>, seen_as: IpAddr) -> Result<()> {
        let requests = self.get(server, count)?;
        for request in &requests {
            match &request.outcome {
                Outcome::Failed(failure) => {
                    bail!("request to {server}: {}: {}", failure.kind, failure.message)
                }
                Outcome::Answer(answer) => {
                    if name.is_some_and(|name| name != answer.name) {
                        bail!("request to {server} was answered by {}", answer.name);
                    }
                    if answer.client.ip() != seen_as {
                        bail!("server of {server} saw the client as {}, not {seen_as}", answer.client);
                    }
                    if answer.server != server {
                        bail!("the peer address of the socket to {server} is {}", answer.server);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sends HTTP requests at an interval until stopped.
    pub fn keep_getting(&self, server: SocketAddr, interval: Duration) -> Result<Client<Vec<Request>>> {
        let (server, interval) = (server.to_string(), interval.as_millis().to_string());
        let process = self.start(bins::traffic()?, &["http", &server, "--interval-ms", &interval])?;
        Ok(Client { process, report: PhantomData })
    }

    /// As [`Self::keep_getting`], with several concurrent clients.
    pub fn keep_getting_concurrently(
        &self,
        server: SocketAddr,
        clients: u32,
        interval: Duration,
    ) -> Result<Client<Vec<Request>>> {
        let (server, clients, interval) =
            (server.to_string(), clients.to_string(), interval.as_millis().to_string());
        let arguments = ["http", &server, "--clients", &clients, "--interval-ms", &interval];
        Ok(Client { process: self.start(bins::traffic()?, &arguments)?, report: PhantomData })
    }

    /// Holds TCP connections open with an echo on each at an interval; returns when all are open.
    pub fn hold(
        &self,
        server: SocketAddr,
        connections: u32,
        interval: Duration,
    ) -> Result<Client<HeldConnections>> {
        let (server, connections) = (server.to_string(), connections.to_string());
        let interval = interval.as_millis().to_string();
        let arguments = ["hold", &server, "--connections", &connections, "--interval-ms", &interval];
        Ok(Client { process: self.start_traffic(&arguments)?, report: PhantomData })
    }

    /// Sends datagrams at an interval until stopped; `more` are arguments of `dataplane-traffic
    /// datagrams`.
    pub fn keep_sending(
        &self,
        server: SocketAddr,
        interval: Duration,
        more: &[&str],
    ) -> Result<Client<Datagrams>> {
        let (server, interval) = (server.to_string(), interval.as_millis().to_string());
        let arguments = [&["datagrams", &server, "--interval-ms", &interval], more].concat();
        Ok(Client { process: self.start_traffic(&arguments)?, report: PhantomData })
    }

    /// Sends `count` datagrams; `more` are arguments of `dataplane-traffic datagrams`.
    pub fn send(&self, server: SocketAddr, count: u32, more: &[&str]) -> Result<Datagrams> {
        let (server, count) = (server.to_string(), count.to_string());
        let arguments = [&["datagrams", &server, "--count", &count, "--interval-ms", "1"], more].concat();
        let text = self.run(bins::traffic()?, &arguments)?;
        serde_json::from_str(text.lines().last().unwrap_or_default()).context("a client's report")
    }

    /// Sends a datagram to each UDP echo server over one socket that is not connected; returns the
    /// sources of the answers in the same order.
    pub fn ask(&self, servers: &[SocketAddr]) -> Result<Vec<Option<SocketAddr>>> {
        let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
        let arguments: Vec<&str> = ["ask"].into_iter().chain(servers.iter().map(String::as_str)).collect();
        let text = self.run(bins::traffic()?, &arguments)?;
        serde_json::from_str(text.lines().last().unwrap_or_default()).context("a client's report")
    }

    /// Runs all probes concurrently; returns their results in the same order.
    pub fn probe(&self, probes: &[Probe]) -> Result<Vec<ProbeResult>> {
        let mut command = self.command(bins::traffic()?)?;
        command.arg("probe").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start dataplane-traffic")?;
        let mut stdin = child.stdin.take().context("a child has no stdin")?;
        for probe in probes {
            writeln!(stdin, "{}", serde_json::to_string(probe)?)?;
        }
        drop(stdin);
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut results: Vec<ProbeResult> =
            text.lines().map_while(|line| serde_json::from_str(line).ok()).collect();
        if !output.status.success() || results.len() != probes.len() {
            let problem = String::from_utf8_lossy(&output.stderr);
            bail!("{} results of {} probes: {}: {problem}", results.len(), probes.len(), output.status);
        }
        results.sort_by_key(|result| probes.iter().position(|probe| probe.number == result.number));
        Ok(results)
    }

    /// Queries a DNS server; `more` are arguments of `dataplane-traffic dns`.
    pub fn resolve(&self, server: SocketAddr, name: &str, more: &[&str]) -> Result<Vec<IpAddr>> {
        let server = server.to_string();
        let text = self.run(bins::traffic()?, &[&["dns", &server, name], more].concat())?;
        let resolved: Resolved = serde_json::from_str(text.trim()).context("a client's report")?;
        Ok(resolved.addresses)
    }

    /// Whether one echo request is answered within this time.
    pub fn is_answered(&self, address: IpAddr, within: Duration) -> Result<bool> {
        let (to, within) = (address.to_string(), format!("{:.3}", within.as_secs_f64()));
        Ok(self.output("ping", &["-n", "-c", "1", "-W", &within, &to])?.status.success())
    }

    /// Sends echo requests with `bytes` bytes of data that must not be fragmented.
    pub fn ping(&self, address: IpAddr, count: u32, bytes: usize) -> Result<Ping> {
        let (to, count, bytes) = (address.to_string(), count.to_string(), bytes.to_string());
        let arguments = ["-n", "-c", &count, "-i", "0.02", "-W", "2", "-M", "do", "-s", &bytes, &to];
        let output = self.output("ping", &arguments)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let summary = text.lines().find(|line| line.contains("packets transmitted"));
        let numbers: Option<Vec<u32>> = summary
            .map(|line| line.split(", ").filter_map(|part| part.split(' ').next()?.parse().ok()).collect());
        match numbers.as_deref() {
            Some([sent, received, ..]) => Ok(Ping { sent: *sent, received: *received }),
            _ => bail!("ping {to}: {text}{}", String::from_utf8_lossy(&output.stderr)),
        }
    }
}

impl Datagrams {
    /// Fails unless every datagram was echoed once by the right server.
    pub fn check(&self) -> Result<()> {
        if !self.is_complete() {
            bail!("datagrams: {self:?}");
        }
        Ok(())
    }
}

impl Ping {
    /// Fails if an echo reply is missing.
    pub fn check(self) -> Result<()> {
        if self.sent == 0 || self.sent != self.received {
            bail!("ping: {} of {} replies received", self.received, self.sent);
        }
        Ok(())
    }
}

/// Number of responses by server name.
pub fn names(requests: &[Request]) -> BTreeMap<String, u64> {
    distribution(requests.iter().filter_map(|request| match &request.outcome {
        Outcome::Answer(answer) => Some(answer.name.clone()),
        Outcome::Failed(_) => None,
    }))
}

/// Number of failures by kind.
pub fn failures(requests: &[Request]) -> BTreeMap<String, u64> {
    distribution(requests.iter().filter_map(|request| match &request.outcome {
        Outcome::Answer(_) => None,
        Outcome::Failed(failure) => Some(failure.kind.clone()),
    }))
}

fn requests(lines: &[String]) -> Result<Vec<Request>> {
    lines.iter().map(|line| serde_json::from_str(line).context("a client's line")).collect()
}
