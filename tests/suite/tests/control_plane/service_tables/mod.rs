//! From objects to rows, held against the oracle: whatever is told of services and slices, in whatever order, the tables of
//! every node answer every client as kube-proxy's rules say, and hold nothing else.
//!
//! The agent's own way from JSON to tables, over tables in memory; the datapath's lookups are read once more
//! ([`datapath`]). What the datapath itself makes of such rows is shown by `prog`, with packets by the path table.
//! What writes may fail, and what a reader sees meanwhile, is the business of the reconciler's own property tests.

mod agent;
mod cluster;
mod datapath;
mod judge;
mod objects;
pub(crate) mod tables;

use std::collections::BTreeSet;

use dataplane_agent::{
    source::objects::Kind,
    state::{ObjectKey, Owner, SourceEvent},
};
use dataplane_oracle::Topology;
use dataplane_testkit::run;
use proptest::{
    prelude::*,
    test_runner::{TestCaseError, TestRunner},
};
use serde_json::Value;

use self::{
    agent::Agent,
    cluster::NODES,
    judge::Told,
    objects::{SERVICES, SLICES, ServiceSpec, SliceSpec},
};

/// Histories that are played by default.
const HISTORIES: u32 = 48;
/// With `DATAPLANE_FULL=1`.
const MANY: u32 = 1_500;

/// Something that is told.
#[derive(Clone, Debug)]
enum Step {
    Service(usize, ServiceSpec),
    ServiceGone(usize),
    Slice(usize, usize, SliceSpec),
    SliceGone(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (services, slices) = (0..SERVICES, 0..SLICES);
    prop_oneof![
        5 => (services.clone(), objects::service()).prop_map(|(service, spec)| Step::Service(service, spec)),
        1 => services.clone().prop_map(Step::ServiceGone),
        8 => (services.clone(), slices.clone(), objects::slice())
            .prop_map(|(service, number, spec)| Step::Slice(service, number, spec)),
        1 => (services, slices).prop_map(|(service, number)| Step::SliceGone(service, number)),
    ]
}

/// A cluster, and what it has been told.
struct Cluster {
    world: Topology,
    agents: Vec<Agent>,
    told: Vec<Told>,
    slices: Vec<[Option<SliceSpec>; SLICES]>,
}

impl Cluster {
    fn new() -> Self {
        Self {
            world: cluster::world(),
            agents: (0..NODES.len()).map(Agent::new).collect(),
            told: vec![Told::default(); SERVICES],
            slices: vec![[const { None }; SLICES]; SERVICES],
        }
    }

    /// Tells every node; the service that is concerned.
    fn play(&mut self, step: &Step) -> usize {
        let (service, event) = match step {
            Step::Service(service, spec) => {
                let object = spec.object(*service);
                self.told[*service].service = Some(object.clone());
                (*service, upsert(Kind::Service, object, &objects::name(*service)))
            }
            Step::ServiceGone(service) => {
                self.told[*service].service = None;
                (*service, gone(Kind::Service, &objects::name(*service)))
            }
            Step::Slice(service, number, spec) => {
                let others = self.slices[*service].iter().enumerate().filter(|(other, _)| other != number);
                let spec = spec.agreeing(&others.filter_map(|(_, spec)| spec.as_ref()));
                let object = spec.object(*service, *number);
                self.slices[*service][*number] = Some(spec);
                self.told[*service].slices.insert(*number, object.clone());
                (*service, upsert(Kind::EndpointSlice, object, &objects::slice_name(*service, *number)))
            }
            Step::SliceGone(service, number) => {
                self.slices[*service][*number] = None;
                self.told[*service].slices.remove(number);
                (*service, gone(Kind::EndpointSlice, &objects::slice_name(*service, *number)))
            }
        };
        for agent in &mut self.agents {
            agent.tell([event.clone()]);
        }
        service
    }

    /// After a step that concerned `service`.
    fn check(&mut self, service: usize) -> Result<(), String> {
        judge::ask(&self.agents, &self.world, service, &self.told[service])?;
        for agent in &mut self.agents {
            let (name, _) = NODES[agent.node];
            let twice = agent.written_twice();
            if !twice.is_empty() {
                return Err(format!("{name}: written more than once for one change: {twice:?}"));
            }
            judge::look(agent, &self.world, &self.told)?;
        }
        Ok(())
    }

    /// At the end: all services at once; nothing is written that was right; and nothing stays of what goes.
    fn finish(mut self) -> Result<(), String> {
        for service in 0..SERVICES {
            judge::ask(&self.agents, &self.world, service, &self.told[service])?;
        }
        for agent in &mut self.agents {
            let rewrites = agent.rewrites();
            if rewrites != 0 {
                return Err(format!("{}: told the same, {rewrites} writes", NODES[agent.node].0));
            }
        }
        let all = (0..SERVICES).flat_map(|service| {
            (0..SLICES)
                .map(move |number| Step::SliceGone(service, number))
                .chain([Step::ServiceGone(service)])
        });
        for step in all {
            self.play(&step);
        }
        self.agents.iter().try_for_each(|agent| {
            let Agent { node, tables, .. } = agent;
            let left = [
                ("SERVICES", tables.services.rows().len()),
                ("SOURCE_RANGES", tables.source_ranges.rows().len()),
                ("BACKEND_GENERATIONS", tables.numbers_in_use().len()),
            ];
            let left: BTreeSet<_> = left.into_iter().filter(|(_, count)| *count > 0).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{}: left behind: {left:?}", NODES[*node].0)) }
        })?;
        self.one_is_all()
    }

    /// With a single backend a single slot is in use: every other has come back.
    fn one_is_all(&mut self) -> Result<(), String> {
        let (service, slice) = objects::smallest();
        self.play(&Step::Service(0, service));
        self.play(&Step::Slice(0, 0, slice));
        self.agents.iter().try_for_each(|agent| match agent.slots_used() {
            1 => Ok(()),
            used => Err(format!("{}: {used} slots for one backend", NODES[agent.node].0)),
        })
    }
}

/// As a source delivers it; an object of which nothing is to be made goes, if it was there.
fn upsert(kind: Kind, object: Value, name: &str) -> SourceEvent {
    let converted = kind.convert(object).expect("an object as the API has it");
    converted.object.map_or_else(|| gone(kind, name), SourceEvent::Upsert)
}

fn gone(kind: Kind, name: &str) -> SourceEvent {
    let key: ObjectKey = kind.key("default", name);
    SourceEvent::Remove(key, Owner::default())
}

#[test]
fn the_tables_answer_as_the_oracle_does() {
    let cases = if run::is_full() { MANY } else { HISTORIES };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let steps = proptest::collection::vec(step(), 1..16);
    let played = TestRunner::new(config).run(&steps, |steps| {
        let mut cluster = Cluster::new();
        for (number, step) in steps.iter().enumerate() {
            let service = cluster.play(step);
            let checked = cluster.check(service);
            checked.map_err(|wrong| TestCaseError::fail(format!("after step {number}: {wrong}")))?;
        }
        cluster.finish().map_err(TestCaseError::fail)
    });
    if let Err(error) = played {
        panic!("{error}");
    }
}
