//! From objects to table rows, compared with the oracle: for any services and slices in any order,
//! the tables of every node give every client the verdict of kube-proxy's rules, and have no other
//! rows.
//!
//! The agent's code runs from JSON to tables in memory; the datapath's lookups are written a second
//! time ([`datapath`]). `prog` and the path table test the datapath itself. The reconciler's own
//! property tests cover failing writes and concurrent readers.

mod agent;
mod cluster;
mod datapath;
mod objects;
pub(crate) mod tables;
mod verify;

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
    objects::{SERVICES, SLICES, ServiceSpec, SliceSpec},
    verify::ServiceFixture,
};

/// Histories by default.
const CASES: u32 = 48;
/// Histories with `DATAPLANE_FULL=1`.
const FULL_CASES: u32 = 1_500;

/// A change of one object.
#[derive(Clone, Debug)]
enum Step {
    ApplyService(usize, ServiceSpec),
    DeleteService(usize),
    ApplySlice(usize, usize, SliceSpec),
    DeleteSlice(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (services, slices) = (0..SERVICES, 0..SLICES);
    prop_oneof![
        5 => (services.clone(), objects::service()).prop_map(|(service, spec)| Step::ApplyService(service, spec)),
        1 => services.clone().prop_map(Step::DeleteService),
        8 => (services.clone(), slices.clone(), objects::slice())
            .prop_map(|(service, number, spec)| Step::ApplySlice(service, number, spec)),
        1 => (services, slices).prop_map(|(service, number)| Step::DeleteSlice(service, number)),
    ]
}

/// A cluster, and the objects of its services.
struct Cluster {
    topology: Topology,
    agents: Vec<Agent>,
    fixtures: Vec<ServiceFixture>,
    slices: Vec<[Option<SliceSpec>; SLICES]>,
}

impl Cluster {
    fn new() -> Self {
        Self {
            topology: cluster::topology(),
            agents: (0..NODES.len()).map(Agent::new).collect(),
            fixtures: vec![ServiceFixture::default(); SERVICES],
            slices: vec![[const { None }; SLICES]; SERVICES],
        }
    }

    /// Applies the step on every node; returns the index of the service.
    fn apply(&mut self, step: &Step) -> usize {
        let (service, event) = match step {
            Step::ApplyService(service, spec) => {
                let object = spec.object(*service);
                self.fixtures[*service].service = Some(object.clone());
                (*service, upsert(Kind::Service, object, &objects::name(*service)))
            }
            Step::DeleteService(service) => {
                self.fixtures[*service].service = None;
                (*service, remove(Kind::Service, &objects::name(*service)))
            }
            Step::ApplySlice(service, number, spec) => {
                let others = self.slices[*service].iter().enumerate().filter(|(other, _)| other != number);
                let spec = spec.without_conflicts(&others.filter_map(|(_, spec)| spec.as_ref()));
                let object = spec.object(*service, *number);
                self.slices[*service][*number] = Some(spec);
                self.fixtures[*service].slices.insert(*number, object.clone());
                (*service, upsert(Kind::EndpointSlice, object, &objects::slice_name(*service, *number)))
            }
            Step::DeleteSlice(service, number) => {
                self.slices[*service][*number] = None;
                self.fixtures[*service].slices.remove(number);
                (*service, remove(Kind::EndpointSlice, &objects::slice_name(*service, *number)))
            }
        };
        for agent in &mut self.agents {
            agent.apply([event.clone()]);
        }
        service
    }

    /// Checks all tables after a step for `service`.
    fn check(&mut self, service: usize) -> Result<(), String> {
        verify::compare_with_oracle(&self.agents, &self.topology, service, &self.fixtures[service])?;
        for agent in &mut self.agents {
            let (name, _) = NODES[agent.node];
            let twice = agent.written_twice();
            if !twice.is_empty() {
                return Err(format!("{name}: written more than once for one change: {twice:?}"));
            }
            verify::check_tables(agent, &self.topology, &self.fixtures)?;
        }
        Ok(())
    }

    /// Checks all services; that a repeated reconciliation writes nothing; and that deleting all
    /// objects empties the tables.
    fn finish(mut self) -> Result<(), String> {
        for service in 0..SERVICES {
            verify::compare_with_oracle(&self.agents, &self.topology, service, &self.fixtures[service])?;
        }
        for agent in &mut self.agents {
            let rewrites = agent.rewrites();
            if rewrites != 0 {
                return Err(format!("{}: {rewrites} writes without a change", NODES[agent.node].0));
            }
        }
        let all = (0..SERVICES).flat_map(|service| {
            (0..SLICES)
                .map(move |number| Step::DeleteSlice(service, number))
                .chain([Step::DeleteService(service)])
        });
        for step in all {
            self.apply(&step);
        }
        self.agents.iter().try_for_each(|agent| {
            let Agent { node, tables, .. } = agent;
            let left = [
                ("SERVICES", tables.services.rows().len()),
                ("SOURCE_RANGES", tables.source_ranges.rows().len()),
                ("BACKEND_GENERATIONS", tables.ids_in_use().len()),
            ];
            let left: BTreeSet<_> = left.into_iter().filter(|(_, count)| *count > 0).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{}: left behind: {left:?}", NODES[*node].0)) }
        })?;
        self.one_backend_uses_one_slot()
    }

    /// Checks that one backend uses one slot: all other slots were released.
    fn one_backend_uses_one_slot(&mut self) -> Result<(), String> {
        let (service, slice) = objects::smallest();
        self.apply(&Step::ApplyService(0, service));
        self.apply(&Step::ApplySlice(0, 0, slice));
        self.agents.iter().try_for_each(|agent| match agent.slots_used() {
            1 => Ok(()),
            used => Err(format!("{}: {used} slots for one backend", NODES[agent.node].0)),
        })
    }
}

/// The event of a source; an object that agents do not use is removed.
fn upsert(kind: Kind, object: Value, name: &str) -> SourceEvent {
    let converted = kind.convert(object).expect("a valid object");
    converted.object.map_or_else(|| remove(kind, name), SourceEvent::Upsert)
}

fn remove(kind: Kind, name: &str) -> SourceEvent {
    let key: ObjectKey = kind.key("default", name);
    SourceEvent::Remove(key, Owner::default())
}

#[test]
fn the_tables_agree_with_the_oracle() {
    let cases = if run::is_full() { FULL_CASES } else { CASES };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let steps = proptest::collection::vec(step(), 1..16);
    let result = TestRunner::new(config).run(&steps, |steps| {
        let mut cluster = Cluster::new();
        for (number, step) in steps.iter().enumerate() {
            let service = cluster.apply(step);
            let checked = cluster.check(service);
            checked.map_err(|error| TestCaseError::fail(format!("after step {number}: {error}")))?;
        }
        cluster.finish().map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
