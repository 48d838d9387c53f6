//! Leading: keeps the Lease, and says until when this allocator may write.
//!
//! Owns the requests about the Lease; the rules are [`super::lease`]'s. What it says ([`Leadership`]) ends by itself:
//! one that cannot reach the API server leads no more before anyone else begins.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    lease::{Candidate, Record, Step},
    settings::Settings,
};
use crate::cluster::explain;

/// What is said of leading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Leadership {
    /// We lead until then, if nothing more is heard.
    pub(super) until: Option<Instant>,
    /// Which time somebody leads: one that leads again leads anew.
    pub(super) term: u64,
    /// Who leads, as far as known.
    pub(super) holder: Option<String>,
    /// The Lease has been read or written at least once.
    pub(super) heard: bool,
}

impl Leadership {
    pub(super) fn leads(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// Keeps the Lease.
#[derive(Debug)]
pub(super) struct Election {
    leases: Api<Lease>,
    name: String,
    terms: super::lease::Terms,
    candidate: Candidate,
    /// As it was last read or written, to be written only if it is still so.
    lease: Option<Lease>,
    says: watch::Sender<Leadership>,
    /// What the log says is wrong already.
    trouble: Option<String>,
}

/// Why the Lease was neither read nor written.
#[derive(Debug, thiserror::Error)]
enum ElectionError {
    #[error("{}", explain(.0))]
    Api(#[from] kube::Error),
    #[error("no answer within {0:?}")]
    Silence(Duration),
}

impl Election {
    pub(super) fn new(client: Client, settings: &Settings) -> (Self, watch::Receiver<Leadership>) {
        let (says, heard) = watch::channel(Leadership::default());
        let election = Self {
            leases: Api::namespaced(client, &settings.lease_namespace),
            name: settings.lease_name.clone(),
            terms: settings.terms,
            candidate: Candidate::new(settings.identity.clone(), settings.terms),
            lease: None,
            says,
            trouble: None,
        };
        (election, heard)
    }

    /// Leads or waits to, for ever. May be dropped at any time; then [`Self::release`].
    pub(super) async fn run(&mut self) {
        loop {
            let began = Instant::now();
            // half of the deadline: two attempts, should the API server hang once
            let patience = self.terms.renew_deadline / 2;
            let done = match timeout(patience, self.attempt()).await {
                Ok(done) => done,
                Err(_elapsed) => Err(ElectionError::Silence(patience)),
            };
            self.complain(done.as_ref().err());
            self.say(began, done.is_ok());
            sleep(self.wait()).await;
        }
    }

    /// A step of the election: reads the Lease unless we hold it, writes it if the rules say so.
    async fn attempt(&mut self) -> Result<(), ElectionError> {
        if self.candidate.leads() && self.lease.is_some() && self.write(Instant::now()).await.is_ok() {
            return Ok(());
        }
        // somebody else wrote it, or it is gone, or nobody knows: look again
        self.lease = self.leases.get_opt(&self.name).await?;
        let now = Instant::now();
        self.candidate.see(self.lease.as_ref().map(record).as_ref(), now);
        self.write(now).await
    }

    async fn write(&mut self, now: Instant) -> Result<(), ElectionError> {
        let Step::Write(record) = self.candidate.step(now, Timestamp::now()) else { return Ok(()) };
        self.put(&record).await
    }

    /// Writes the Lease as last read: somebody else's write in between makes it fail.
    async fn put(&mut self, next: &Record) -> Result<(), ElectionError> {
        let written = match self.lease.clone() {
            Some(mut lease) => {
                fill(lease.spec.get_or_insert_default(), next);
                self.leases.replace(&self.name, &PostParams::default(), &lease).await?
            }
            None => {
                let mut spec = LeaseSpec::default();
                fill(&mut spec, next);
                let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
                let lease = Lease { metadata, spec: Some(spec) };
                self.leases.create(&PostParams::default(), &lease).await?
            }
        };
        self.candidate.see(Some(&record(&written)), Instant::now());
        self.lease = Some(written);
        Ok(())
    }

    /// Says who leads. What was begun at `began` and succeeded counts from then: nobody can have seen it earlier.
    fn say(&self, began: Instant, succeeded: bool) {
        let now = Instant::now();
        let leads = self.candidate.leads();
        self.says.send_modify(|said| {
            let led = said.leads(now);
            if leads && succeeded {
                if !led {
                    said.term += 1;
                    tracing::info!(term = said.term, "leads");
                }
                said.until = Some(began + self.terms.renew_deadline);
            } else if !leads || !led {
                if said.until.is_some() {
                    tracing::warn!(holder = self.candidate.holder(), "leads no more");
                }
                said.until = None;
            }
            let holder = self.candidate.holder().map(str::to_owned);
            if holder != said.holder {
                tracing::info!(holder, "the Lease has another holder");
                said.holder = holder;
            }
            said.heard |= succeeded;
        });
    }

    /// Until the next attempt: a part of it is chance, so that candidates do not come all at once. While leading not
    /// later than leading ends.
    fn wait(&self) -> Duration {
        let chance = Timestamp::now().subsec_nanosecond().unsigned_abs() % 1_000;
        let wait = self.terms.retry.mul_f64(1.0 + f64::from(chance) / 5_000.0);
        let left = self.says.borrow().until.map(|until| until.saturating_duration_since(Instant::now()));
        left.filter(|left| !left.is_zero()).map_or(wait, |left| wait.min(left))
    }

    fn complain(&mut self, error: Option<&ElectionError>) {
        let reason = error.map(ToString::to_string);
        if let Some(reason) = &reason
            && self.trouble.as_ref() != Some(reason)
        {
            tracing::warn!(lease = self.name, reason, "the Lease is not renewed");
        }
        self.trouble = reason;
    }

    /// Lets another one lead at once. Nothing may be written after that.
    pub(super) async fn release(mut self) {
        self.says.send_modify(|said| said.until = None);
        let Some(record) = self.candidate.release(Timestamp::now()) else { return };
        match timeout(self.terms.retry, self.put(&record)).await {
            Ok(Ok(())) => tracing::info!("the Lease is released"),
            Ok(Err(error)) => tracing::warn!(%error, "release the Lease"),
            Err(_elapsed) => tracing::warn!("release the Lease: no answer"),
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        duration_seconds: spec.lease_duration_seconds.unwrap_or_default(),
        acquired: spec.acquire_time.map(|time| time.0),
        renewed: spec.renew_time.map(|time| time.0),
        transitions: spec.lease_transitions.unwrap_or_default(),
    }
}

fn fill(spec: &mut LeaseSpec, record: &Record) {
    spec.holder_identity = Some(record.holder.clone());
    spec.lease_duration_seconds = Some(record.duration_seconds);
    spec.acquire_time = record.acquired.map(MicroTime);
    spec.renew_time = record.renewed.map(MicroTime);
    spec.lease_transitions = Some(record.transitions);
}
