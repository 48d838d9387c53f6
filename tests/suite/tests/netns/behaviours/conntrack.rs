//! One UDP socket that goes on asking, while who answers it goes and another comes: the tests of Kubernetes about entries of
//! the kernel's conntrack, which is not in the way here, and about what stands in its place.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Client, Family, Place, wait},
    only_in_full,
    traffic::{now_us, report::Datagrams},
};
use serde_json::json;

use super::{
    bed::{Bed, Mode, on, on_both},
    told::{self, Told, ended, ready},
};

const PATIENCE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);
/// Questions that nobody answers, before somebody is there who does.
const UNANSWERED: u64 = 20;
/// Of two who ask side by side, so that each has asked [`UNANSWERED`] times, or half as often.
const ENOUGH: u64 = 4 * UNANSWERED;
/// Of a second server in a pod.
const OTHER_ECHO: u16 = 9_107;

/// Who goes on asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    Pod(usize),
    Host(usize),
    Outside,
}

impl Asker {
    fn place(self, bed: &Bed) -> &Place {
        match self {
            Self::Pod(node) => bed.clients[node].place(),
            Self::Host(node) => bed.host(node),
            Self::Outside => &bed.outside,
        }
    }
}

/// A server that goes and one that comes.
pub(crate) struct Cycle {
    pub(crate) number: u16,
    pub(crate) asker: Asker,
    /// Where the first is, and the second.
    pub(crate) nodes: [usize; 2],
}

/// Sockets of both families, each of which asks and asks.
fn talks(bed: &Bed, asker: Asker, at: impl Fn(Family) -> SocketAddr) -> Result<Vec<Client<Datagrams>>> {
    let talk = |family| asker.place(bed).keep_sending(at(family), INTERVAL, &["--each"]);
    Family::BOTH.into_iter().map(talk).collect()
}

impl Cycle {
    /// Where both are is where `at` says, of a service as `change` makes it.
    pub(crate) fn preserves_udp(
        &self,
        mode: Mode,
        change: impl Fn(&mut Told),
        at: impl Fn(&Bed, &Told, Family) -> SocketAddr,
    ) -> Result<()> {
        on(mode, |bed| self.play(bed, &change, &at))
    }

    fn play(
        &self,
        bed: &mut Bed,
        change: &dyn Fn(&mut Told),
        at: &dyn Fn(&Bed, &Told, Family) -> SocketAddr,
    ) -> Result<()> {
        let names = [1, 2].map(|which| format!("server-{}-{which}", self.number));
        let first = bed.cluster.pod(self.nodes[0], &names[0])?;
        let mut server = first.serve()?;
        let mut told = Told::of("udp-cycles", self.number, &[&first]);
        change(&mut told);
        bed.tell(&told)?;
        let talks = talks(bed, self.asker, |family| at(bed, &told, family))?;
        for talk in &talks {
            talk.wait_echo(&names[0], 0, PATIENCE)?;
        }

        // as a pod ends that is given no time for it: for a while there is nobody
        told.each(ended);
        bed.tell(&told)?;
        let gone = now_us()?;
        server.kill()?;
        first.delete()?;
        let second = bed.cluster.pod(self.nodes[1], &names[1])?;
        let successor = second.serve()?;
        told.replace(&[&second]);
        bed.tell(&told)?;
        let back = now_us()?;
        for talk in &talks {
            talk.wait_echo(&names[1], back, PATIENCE)?;
        }
        for talk in talks {
            let heard = talk.finish()?;
            ensure!(heard.servers.keys().eq(&names), "{heard:?}");
            ensure!(heard.latest_us[&names[0]] <= gone, "the first was asked after it had gone: {heard:?}");
            ensure!(heard.misdirected + heard.duplicated == 0, "{heard:?}");
        }
        bed.withdraw(&told)?;
        drop(successor);
        second.delete()
    }
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_node_port_service() -> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 42, asker: Asker::Pod(1), nodes: [0, 0] };
    Mode::BOTH.into_iter().try_for_each(|mode| {
        cycle.preserves_udp(
            mode,
            |told| told.set_type("NodePort"),
            |bed, told, family| bed.at_node(0, family, told.node_port(1)),
        )
    })
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service() -> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 43, asker: Asker::Pod(0), nodes: [1, 1] };
    Mode::BOTH
        .into_iter()
        .try_for_each(|mode| cycle.preserves_udp(mode, |_| {}, |_, told, family| told.cluster(family)[1]))
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service_with_internal_traffic_policy_set_to_local()
-> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 44, asker: Asker::Pod(0), nodes: [0, 0] };
    Mode::BOTH.into_iter().try_for_each(|mode| {
        cycle.preserves_udp(
            mode,
            |told| told.service["spec"]["internalTrafficPolicy"] = json!("Local"),
            |_, told, family| told.cluster(family)[1],
        )
    })
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service_and_client_is_host_network()
-> Result<()> {
    only_in_full!();
    let cycle = Cycle { number: 45, asker: Asker::Host(0), nodes: [1, 1] };
    Mode::BOTH
        .into_iter()
        .try_for_each(|mode| cycle.preserves_udp(mode, |_| {}, |_, told, family| told.cluster(family)[1]))
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("udp-unready", 46, &[&bed.webs[1]]).on_nodes();
        told.each(told::unready);
        bed.tell(&told)?;
        let refused = |bed: &Bed| -> Result<[u64; 2]> {
            let nodes = bed.cluster.nodes();
            Ok([nodes[0].count("from_pod", "no_backend")?, nodes[1].count("from_wire", "no_backend")?])
        };
        let before = refused(bed)?;
        let mut talks = talks(bed, Asker::Pod(0), |family| told.cluster(family)[1])?;
        talks.extend(self::talks(bed, Asker::Outside, |family| bed.at_node(1, family, told.node_port(1)))?);
        wait::until("questions that nobody answers", PATIENCE, || {
            let are_enough = refused(bed)?.iter().zip(before).all(|(now, before)| *now > before + ENOUGH);
            Ok(are_enough.then_some(()))
        })?;
        told.each(ready);
        bed.tell(&told)?;
        let back = now_us()?;
        for talk in talks {
            talk.wait_echo("web-1", back, PATIENCE)?;
            let heard = talk.finish()?;
            ensure!(heard.lost >= UNANSWERED / 2 && heard.misdirected == 0, "{heard:?}");
        }
        bed.withdraw(&told)
    })
}

/// The pod stays, another port of it is the service's: who asks from the same socket as before is answered there.
#[test]
fn should_be_able_to_cleanup_conntrack_entries_when_udp_service_target_port_changes_for_a_node_port_service()
-> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let (http, echo) = ("9108", OTHER_ECHO.to_string());
        let _other = bed.webs[0]
            .place()
            .start_traffic(&["serve", "--name", "other", "--http", http, "--echo", &echo])?;
        let mut told = Told::of("udp-target", 47, &[&bed.webs[0]]).on_nodes();
        bed.tell(&told)?;
        let mut talks = talks(bed, Asker::Pod(1), |family| bed.at_node(0, family, told.node_port(1)))?;
        talks.extend(self::talks(bed, Asker::Pod(1), |family| told.cluster(family)[1])?);
        talks.extend(self::talks(bed, Asker::Outside, |family| bed.at_node(1, family, told.node_port(1)))?);
        for talk in &talks {
            talk.wait_echo("web-0", 0, PATIENCE)?;
        }
        told.service["spec"]["ports"][1]["targetPort"] = json!(OTHER_ECHO);
        told.slices.iter_mut().for_each(|slice| slice["ports"][1]["port"] = json!(OTHER_ECHO));
        bed.tell(&told)?;
        let moved = now_us()?;
        for talk in talks {
            talk.wait_echo("other", moved, PATIENCE)?;
            let heard = talk.finish()?;
            ensure!(heard.latest_us["web-0"] <= moved && heard.lost + heard.misdirected == 0, "{heard:?}");
        }
        bed.withdraw(&told)
    })
}
