//! Two packets of one connection on two CPUs at once: one flow.

use std::thread;

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::{
    prog::{FLOWS, Family, Frame, Parsed, at, per_packet_udp, rig_with},
    run::skip,
};

/// As many as the table holds, of which each race may use two slots for a moment.
const RACES: u16 = (FLOWS / 2) as u16;

#[test]
fn first_datagrams_on_two_cpus_get_one_backend() -> Result<()> {
    if thread::available_parallelism()?.get() < 2 {
        skip("a race needs two CPUs");
        return Ok(());
    }
    for family in Family::BOTH {
        for backends in [vec![1, 2, 3], vec![1]] {
            let (mut rig, world) = rig_with(family, &per_packet_udp())?;
            let backends: Vec<_> = backends.iter().map(|port| at(world.wire_pod, 8_080 + port)).collect();
            rig.service(world.service, Protocol::UDP, 60, &backends, 0)?;
            let clients: Vec<_> = (0..RACES).map(|number| at(world.pod, 10_000 + number)).collect();
            let frames: Vec<_> =
                clients.iter().map(|client| Frame::udp(*client, world.service).build()).collect();
            let results = rig.race(HookId::FromPod, &frames)?;
            for (client, outputs) in clients.iter().zip(results) {
                let [first, second] = outputs.map(|frame| Parsed::read(&frame).map(|packet| packet.tuple()));
                assert_eq!(first, second, "{backends:?}");
                // the answer finds its way
                let (source, backend) = first.expect("a packet");
                let run = rig.run(HookId::FromWire, &Frame::udp(backend, source).build())?;
                assert_eq!(run.packet().tuple(), (world.service, *client));
            }
            assert_eq!(rig.flows()?.len(), usize::from(RACES));
        }
    }
    Ok(())
}
