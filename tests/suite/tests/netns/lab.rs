//! The lab itself: fabric, namespaces, traffic tools and their removal. Runs no agent.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::Result;
use dataplane_testkit::lab::{Cluster, OUTSIDE_V4, OUTSIDE_V6, Segment, Spec, failures, names};

const HTTP: u16 = 8080;
const ECHO: u16 = 7000;

#[test]
fn nodes_reach_each_other_and_an_external_host() -> Result<()> {
    let spec = Spec { nodes: vec![Segment::FIRST, Segment::FIRST, Segment::SECOND], ..Spec::new(3) };
    let cluster = Cluster::create_stopped(&spec)?;
    let [near, far, routed] = cluster.nodes() else { unreachable!("the spec has three nodes") };
    let external = cluster.outside()?;
    let _servers = [far.serve()?, routed.serve()?, external.serve("external")?];

    let servers = [
        (far.name(), far.addresses()),
        (routed.name(), routed.addresses()),
        ("external", [OUTSIDE_V4.into(), OUTSIDE_V6.into()]),
    ];
    for (name, addresses) in servers {
        for address in addresses {
            near.place().ping(address, 3, 1_000)?.check()?;
            let requests = near.place().get_bytes(SocketAddr::new(address, HTTP), 3, 100_000)?;
            assert_eq!(names(&requests), [(name.to_owned(), 3)].into(), "{:?}", failures(&requests));

            let held =
                near.place().hold(SocketAddr::new(address, ECHO), 50, Duration::from_millis(10))?.finish()?;
            assert_eq!((held.connections, held.received, held.misdirected), (50, held.sent, 0), "{held:?}");
            assert!(held.broken.is_empty() && held.servers == [(name.to_owned(), 50)].into(), "{held:?}");

            for kind in [&[][..], &["--connected"], &["--fresh"], &["--size", "3000"]] {
                let datagrams = near.place().send(SocketAddr::new(address, ECHO), 20, kind)?;
                assert_eq!(
                    (datagrams.sent, datagrams.received, datagrams.lost),
                    (20, 20, 0),
                    "{datagrams:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn losses_and_refusals_are_reported() -> Result<()> {
    let cluster = Cluster::create_stopped(&Spec::new(2))?;
    let [near, far] = cluster.nodes() else { unreachable!("the spec has two nodes") };
    let server = far.serve()?;
    let far_v4 = far.addresses()[0];

    let held = near.place().hold(SocketAddr::new(far_v4, ECHO), 5, Duration::from_millis(10))?;
    drop(server);
    let held = held.finish()?;
    assert_eq!(held.broken.values().sum::<u32>(), 5, "{held:?}");

    let requests = near.place().get(SocketAddr::new(far_v4, HTTP), 2)?;
    assert_eq!(failures(&requests), [("refused".to_owned(), 2)].into());
    let datagrams = near.place().send(SocketAddr::new(far_v4, ECHO), 5, &["--timeout-ms", "50"])?;
    assert_eq!((datagrams.lost, datagrams.received), (5, 0), "{datagrams:?}");
    Ok(())
}

#[test]
fn dropping_the_cluster_removes_everything() -> Result<()> {
    let spec = Spec::new(1);
    let cluster = Cluster::create_stopped(&spec)?;
    let server = cluster.nodes()[0].serve()?;
    let pid = server.pid();
    // as if the test process had crashed
    server.detach();
    let directory = Path::new("/run/dataplane-lab").join(&spec.name);
    let cgroup = cluster.nodes()[0].place().cgroup().to_owned();
    assert!(directory.exists() && cgroup.exists());
    drop(cluster);

    assert!(!directory.exists() && !cgroup.exists());
    assert!(!Path::new("/proc").join(pid.to_string()).join("exe").exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&spec.name));
    let namespaces =
        std::fs::read_dir("/run/netns")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    assert_eq!(namespaces.filter(|name| name.contains(&spec.name)).count(), 0);
    Ok(())
}
