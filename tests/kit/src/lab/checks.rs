//! Many claims about one cluster: all are looked at, all that do not hold are named, with what the nodes know.

use std::time::Instant;

use anyhow::{Result, bail, ensure};

use super::{
    cluster::Cluster,
    family::Family,
    traffic::{Client, failures},
};
use crate::traffic::report::{Datagrams, Request};

/// Collects what does not hold.
#[derive(Debug)]
pub struct Checks {
    what: String,
    held: u32,
    failures: Vec<String>,
}

impl Checks {
    /// `what` names the situation.
    pub fn of(what: impl Into<String>) -> Self {
        Self { what: what.into(), held: 0, failures: Vec::new() }
    }

    /// Looks at a claim.
    pub fn that(&mut self, claim: impl AsRef<str>, look: impl FnOnce() -> Result<()>) {
        let began = Instant::now();
        match look() {
            Ok(()) => self.held += 1,
            Err(error) => {
                self.failures.push(format!("{} ({:.1?}): {error:#}", claim.as_ref(), began.elapsed()));
            }
        }
    }

    /// Ends clients that ran all the while: every request was answered, every datagram came back.
    pub fn nothing_lost(
        &mut self,
        family: Family,
        requests: Client<Vec<Request>>,
        datagrams: Client<Datagrams>,
    ) {
        self.that(format!("no request failed ({family})"), || {
            let requests = requests.stop()?;
            ensure!(!requests.is_empty(), "nothing was asked");
            ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
            Ok(())
        });
        self.that(format!("no datagram was lost ({family})"), || datagrams.finish()?.check());
    }

    /// Fails if anything did.
    pub fn finish(self, cluster: &Cluster) -> Result<()> {
        let Self { what, held, failures } = self;
        if failures.is_empty() {
            return Ok(());
        }
        bail!(
            "{what}: {} of {} claims do not hold:\n- {}\n{}",
            failures.len(),
            failures.len() + held as usize,
            failures.join("\n- "),
            cluster.evidence()
        )
    }
}
