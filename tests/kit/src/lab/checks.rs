//! Several checks of one cluster: all run, all failures are reported together with the nodes'
//! diagnostics.

use std::time::Instant;

use anyhow::{Result, bail, ensure};

use super::{
    cluster::Cluster,
    family::Family,
    traffic::{Client, failures},
};
use crate::traffic::report::{Datagrams, Request};

/// Collects failed checks.
#[derive(Debug)]
pub struct Checks {
    what: String,
    passed: u32,
    failures: Vec<String>,
}

impl Checks {
    /// `what` names the situation in which the checks run.
    pub fn of(what: impl Into<String>) -> Self {
        Self { what: what.into(), passed: 0, failures: Vec::new() }
    }

    /// Runs a check; `claim` is the behaviour it expects.
    pub fn that(&mut self, claim: impl AsRef<str>, check: impl FnOnce() -> Result<()>) {
        let began = Instant::now();
        match check() {
            Ok(()) => self.passed += 1,
            Err(error) => {
                self.failures.push(format!("{} ({:.1?}): {error:#}", claim.as_ref(), began.elapsed()));
            }
        }
    }

    /// Stops clients that ran in the background and checks that every request was answered and
    /// every datagram returned.
    pub fn nothing_lost(
        &mut self,
        family: Family,
        requests: Client<Vec<Request>>,
        datagrams: Client<Datagrams>,
    ) {
        self.that(format!("no request failed ({family})"), || {
            let requests = requests.stop()?;
            ensure!(!requests.is_empty(), "no request was sent");
            ensure!(
                failures(&requests).is_empty(),
                "{:?} of {} requests failed",
                failures(&requests),
                requests.len()
            );
            Ok(())
        });
        self.that(format!("no datagram was lost ({family})"), || datagrams.finish()?.check());
    }

    /// Fails if any check failed.
    pub fn finish(self, cluster: &Cluster) -> Result<()> {
        let Self { what, passed, failures } = self;
        if failures.is_empty() {
            return Ok(());
        }
        bail!(
            "{what}: {} of {} checks failed:\n- {}\n{}",
            failures.len(),
            failures.len() + passed as usize,
            failures.join("\n- "),
            cluster.diagnostics()
        )
    }
}
