//! Services that become something else: what they were is gone, what they are is there.

use anyhow::Result;
use dataplane_testkit::{lab::Family, only_in_full};

use super::{
    bed::{Bed, answers, nobody, on_both},
    told::Told,
};

/// What is to be seen of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Cluster,
    NodePort,
}

impl Seen {
    fn of(kind: &str) -> Self {
        match kind {
            "ExternalName" => Self::Nothing,
            "NodePort" => Self::NodePort,
            _ => Self::Cluster,
        }
    }

    /// By a pod, a host and the outside.
    fn check(self, bed: &Bed, told: &Told) -> Result<()> {
        for family in Family::BOTH {
            let ([cluster, _], port) = (told.cluster(family), bed.at_node(1, family, told.node_port(0)));
            for place in [bed.clients[0].place(), bed.host(0), &bed.outside] {
                if place.namespace().name() != bed.outside.namespace().name() {
                    match self {
                        Self::Nothing => nobody(place, cluster)?,
                        Self::Cluster | Self::NodePort => answers(place, cluster, &bed.names(&[0, 1]))?,
                    }
                }
                match self {
                    Self::Nothing | Self::Cluster => nobody(place, port)?,
                    Self::NodePort => answers(place, port, &bed.names(&[0, 1]))?,
                }
            }
        }
        Ok(())
    }
}

fn change_of_type(number: u16, from: &str, to: &str) -> Result<()> {
    on_both(|bed| {
        let mut told = Told::of("changes-type", number, &[&bed.webs[0], &bed.webs[1]]);
        for kind in [from, to, from] {
            told.set_type(kind);
            bed.tell(&told)?;
            Seen::of(kind).check(bed, &told)?;
        }
        bed.withdraw(&told)
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
