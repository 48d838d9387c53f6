//! Packets to the host's own ports: recognised by the port, without a lookup of a flow or frontend.

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, rig};

const NODE_PORT: u16 = 30_080;

/// A node with a node port, whose backend is on another node.
fn node(family: Family) -> Result<(Rig, World)> {
    let (mut rig, world) = rig(family)?;
    rig.host_with_node_ports(world.host)?;
    rig.service_with(
        at(world.host, NODE_PORT),
        Protocol::TCP,
        200,
        &[at(world.wire_pod, 8080)],
        |key, _| *key = key.at_node(),
    )?;
    Ok((rig, world))
}

/// The map decides: a frontend whose port it does not have is not found.
#[test]
fn frontend_is_looked_up_only_for_ports_of_frontends() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let syn = |port| Frame::tcp(at(world.outside, 40_000), at(world.host, port), 2);
        let run = rig.run(HookId::FromWire, &syn(NODE_PORT).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"));
        rig.forget_ports()?;
        let to_other = Frame { src: at(world.outside, 40_001), ..syn(NODE_PORT) };
        let run = rig.run(HookId::FromWire, &to_other.build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

/// The port is the client's or one of the node's range, and no frontend's.
#[test]
fn replies_to_the_host_are_translated_whatever_their_port() -> Result<()> {
    for family in Family::BOTH {
        let world = World::new(family);
        for (hook, client, server) in [
            // a process of the host, whose source stays
            (HookId::ToWire, at(world.host, 45_678), world.service),
            // a client outside, whose source becomes the node's
            (HookId::FromWire, at(world.outside, 40_000), at(world.host, NODE_PORT)),
        ] {
            let (mut rig, _) = node(family)?;
            let (src, dst) = rig.run(hook, &Frame::tcp(client, server, 2).build())?.packet().tuple();
            rig.forget_ports()?;
            assert_eq!(src.ip(), world.host);
            let reply = rig.run(HookId::FromWire, &Frame::tcp(dst, src, 0x12).build())?;
            assert_eq!(reply.packet().tuple(), (server, client), "{hook:?}");
        }
    }
    Ok(())
}

/// A later fragment has no port.
#[test]
fn fragments_to_a_node_port_are_translated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        rig.service_with(
            at(world.host, NODE_PORT),
            Protocol::UDP,
            210,
            &[at(world.wire_pod, 53)],
            |key, _| *key = key.at_node(),
        )?;
        let frame = |fragment| Frame {
            fragment: Some(fragment),
            payload: vec![7; 64],
            id: 7,
            ..Frame::udp(at(world.outside, 40_000), at(world.host, NODE_PORT))
        };
        for fragment in [(0, true), (72, false)] {
            let run = rig.run(HookId::FromWire, &frame(fragment).build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"), "{fragment:?}");
        }
    }
    Ok(())
}
