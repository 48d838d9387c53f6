//! Services that change their type: frontends of the old type disappear, those of the new one work.

use anyhow::Result;
use dataplane_testkit::{lab::Family, only_in_full};

use super::{
    service_fixture::ServiceFixture,
    testbed::{Testbed, expect_answers, expect_no_answer, on_both},
};

/// The frontends of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frontends {
    None,
    ClusterIp,
    NodePort,
}

impl Frontends {
    fn of(kind: &str) -> Self {
        match kind {
            "ExternalName" => Self::None,
            "NodePort" => Self::NodePort,
            _ => Self::ClusterIp,
        }
    }

    /// Checks from a pod, a host and an external client.
    fn check(self, testbed: &Testbed, fixture: &ServiceFixture) -> Result<()> {
        for family in Family::BOTH {
            let ([cluster, _], port) =
                (fixture.cluster_ip_ports(family), testbed.at_node(1, family, fixture.node_port(0)));
            for place in [testbed.clients[0].place(), testbed.host(0), &testbed.external] {
                if place.namespace().name() != testbed.external.namespace().name() {
                    match self {
                        Self::None => expect_no_answer(place, cluster)?,
                        Self::ClusterIp | Self::NodePort => {
                            expect_answers(place, cluster, &testbed.names(&[0, 1]))?;
                        }
                    }
                }
                match self {
                    Self::None | Self::ClusterIp => expect_no_answer(place, port)?,
                    Self::NodePort => expect_answers(place, port, &testbed.names(&[0, 1]))?,
                }
            }
        }
        Ok(())
    }
}

fn change_of_type(number: u16, from: &str, to: &str) -> Result<()> {
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("changes-type", number, &[&testbed.webs[0], &testbed.webs[1]]);
        for kind in [from, to, from] {
            fixture.set_type(kind);
            testbed.apply_service(&fixture)?;
            Frontends::of(kind).check(testbed, &fixture)?;
        }
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_be_able_to_change_the_type_from_external_name_to_cluster_ip() -> Result<()> {
    only_in_full!();
    change_of_type(53, "ExternalName", "ClusterIP")
}

#[test]
fn should_be_able_to_change_the_type_from_external_name_to_node_port() -> Result<()> {
    only_in_full!();
    change_of_type(54, "ExternalName", "NodePort")
}

#[test]
fn should_be_able_to_change_the_type_from_cluster_ip_to_external_name() -> Result<()> {
    only_in_full!();
    change_of_type(55, "ClusterIP", "ExternalName")
}

#[test]
fn should_be_able_to_change_the_type_from_node_port_to_external_name() -> Result<()> {
    only_in_full!();
    change_of_type(56, "NodePort", "ExternalName")
}
