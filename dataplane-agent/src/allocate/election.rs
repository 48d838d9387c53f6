//! Leader election: renews the Lease and publishes until when this allocator may write.
//!
//! Owns the requests for the Lease; the rules are in [`super::lease`]. The published [`Leadership`]
//! expires by itself: an allocator that cannot reach the API server stops leading before another
//! one starts.

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

/// The leadership as published to the controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Leadership {
    /// This allocator leads until then, unless the Lease is renewed.
    pub(super) until: Option<Instant>,
    /// Incremented each time this allocator becomes the leader.
    pub(super) term: u64,
    /// The current leader, if known.
    pub(super) holder: Option<String>,
    /// The Lease was read or written at least once.
    pub(super) lease_seen: bool,
}

impl Leadership {
    pub(super) fn is_leader(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// Acquires and renews the Lease.
#[derive(Debug)]
pub(super) struct Election {
    leases: Api<Lease>,
    name: String,
    timing: super::lease::LeaseTiming,
    candidate: Candidate,
    /// The Lease as last read or written: the next write fails if it changed.
    lease: Option<Lease>,
    leadership: watch::Sender<Leadership>,
    /// The error last logged.
    last_error: Option<String>,
}

/// Why a Lease request failed.
#[derive(Debug, thiserror::Error)]
enum ElectionError {
    #[error("{}", explain(.0))]
    Api(#[from] kube::Error),
    #[error("no response within {0:?}")]
    Timeout(Duration),
}

impl Election {
    pub(super) fn new(client: Client, settings: &Settings) -> (Self, watch::Receiver<Leadership>) {
        let (leadership, receiver) = watch::channel(Leadership::default());
        let election = Self {
            leases: Api::namespaced(client, &settings.lease_namespace),
            name: settings.lease_name.clone(),
            timing: settings.lease_timing,
            candidate: Candidate::new(settings.identity.clone(), settings.lease_timing),
            lease: None,
            leadership,
            last_error: None,
        };
        (election, receiver)
    }

    /// Runs the election. May be dropped at any time; then call [`Self::release`].
    pub(super) async fn run(&mut self) {
        loop {
            let began = Instant::now();
            // half of the deadline, so that one attempt may hang
            let attempt_timeout = self.timing.renew_deadline / 2;
            let result = match timeout(attempt_timeout, self.try_acquire_or_renew()).await {
                Ok(result) => result,
                Err(_elapsed) => Err(ElectionError::Timeout(attempt_timeout)),
            };
            self.log_error(result.as_ref().err());
            self.publish(began, result.is_ok());
            sleep(self.retry_delay()).await;
        }
    }

    /// One step: reads the Lease unless this allocator holds it, and writes it if the rules say so.
    async fn try_acquire_or_renew(&mut self) -> Result<(), ElectionError> {
        if self.candidate.is_leader() && self.lease.is_some() && self.write(Instant::now()).await.is_ok() {
            return Ok(());
        }
        // the Lease was changed or deleted, or the state is unknown: read it
        self.lease = self.leases.get_opt(&self.name).await?;
        let now = Instant::now();
        self.candidate.observe(self.lease.as_ref().map(record).as_ref(), now);
        self.write(now).await
    }

    async fn write(&mut self, now: Instant) -> Result<(), ElectionError> {
        let Step::Write(record) = self.candidate.step(now, Timestamp::now()) else { return Ok(()) };
        self.write_lease(&record).await
    }

    /// Writes the Lease; fails if it changed since it was read.
    async fn write_lease(&mut self, next: &Record) -> Result<(), ElectionError> {
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
        self.candidate.observe(Some(&record(&written)), Instant::now());
        self.lease = Some(written);
        Ok(())
    }

    /// Publishes the leadership. A renewal counts from `began`, because others may have observed it
    /// since then.
    fn publish(&self, began: Instant, succeeded: bool) {
        let now = Instant::now();
        let leads = self.candidate.is_leader();
        self.leadership.send_modify(|current| {
            let led = current.is_leader(now);
            if leads && succeeded {
                if !led {
                    current.term += 1;
                    tracing::info!(term = current.term, "became leader");
                }
                current.until = Some(began + self.timing.renew_deadline);
            } else if !leads || !led {
                if current.until.is_some() {
                    tracing::warn!(holder = self.candidate.holder(), "stopped leading");
                }
                current.until = None;
            }
            let holder = self.candidate.holder().map(str::to_owned);
            if holder != current.holder {
                tracing::info!(holder, "leader changed");
                current.holder = holder;
            }
            current.lease_seen |= succeeded;
        });
    }

    /// Delay before the next attempt, with jitter; while leading, not later than the term ends.
    fn retry_delay(&self) -> Duration {
        let jitter = Timestamp::now().subsec_nanosecond().unsigned_abs() % 1_000;
        let retry_delay = self.timing.retry_period.mul_f64(1.0 + f64::from(jitter) / 5_000.0);
        let left =
            self.leadership.borrow().until.map(|until| until.saturating_duration_since(Instant::now()));
        left.filter(|left| !left.is_zero()).map_or(retry_delay, |left| retry_delay.min(left))
    }

    fn log_error(&mut self, error: Option<&ElectionError>) {
        let reason = error.map(ToString::to_string);
        if let Some(reason) = &reason
            && self.last_error.as_ref() != Some(reason)
        {
            tracing::warn!(lease = self.name, reason, "cannot acquire or renew Lease; retrying");
        }
        self.last_error = reason;
    }

    /// Releases the Lease, so that another allocator can lead at once. Nothing may be written
    /// afterwards.
    pub(super) async fn release(mut self) {
        self.leadership.send_modify(|current| current.until = None);
        let Some(record) = self.candidate.release(Timestamp::now()) else { return };
        match timeout(self.timing.retry_period, self.write_lease(&record)).await {
            Ok(Ok(())) => tracing::info!("released Lease"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot release Lease; it expires by itself"),
            Err(_elapsed) => tracing::warn!("cannot release Lease: no response; it expires by itself"),
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
