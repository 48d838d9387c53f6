//! Flows and fragments, as the programs have written them; and as time or another processor would change them.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use dataplane_common::abi::{
    Flow, FlowFlags, FlowKey, FlowRef, FragmentKey, FragmentPorts, Port, ReorderKey, names::map,
};

use super::{FLOWS, Rig};

impl Rig {
    /// Every flow, each led to by both of its tuples; a direct one by its forward tuple.
    ///
    /// # Errors
    /// Also if half a pair is found: a tuple without its flow, or a flow with one tuple.
    pub fn flows(&mut self) -> Result<Vec<Flow>> {
        let index: Vec<(FlowKey, FlowRef)> =
            self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.iter().collect::<Result<_, _>>()?;
        let mut flows = Vec::new();
        for (key, reference) in &index {
            let flow: Flow = self.array(map::FLOWS)?.get(&reference.slot, 0)?;
            ensure!(flow.epoch == reference.epoch, "{key:?} leads to a flow of another epoch");
            ensure!(flow.forward == *key || flow.reply == *key, "{key:?} leads to a flow it is no part of");
            if flow.forward == *key {
                // answers to what went on directly pass another node
                let is_direct = flow.flags & FlowFlags::DIRECT != 0;
                let has_way_back = index.iter().any(|(other, _)| *other == flow.reply);
                ensure!(is_direct != has_way_back, "{key:?} has no way back, or one it must not have");
                flows.push(flow);
            } else {
                // or the forward tuple belongs to a successor: a connection that re-used the ports, or moved to
                // another backend, while the replies of its predecessor are still restored
                ensure!(index.iter().any(|(other, _)| *other == flow.forward), "{key:?} has no way forth");
            }
        }
        Ok(flows)
    }

    /// Which fragments are held for their first.
    pub fn held(&mut self) -> Result<Vec<ReorderKey>> {
        // of the value only its size matters
        let held = self.hash::<ReorderKey, [u32; 512]>(map::REORDER_FRAGMENTS)?;
        Ok(held.keys().collect::<Result<_, _>>()?)
    }

    /// As if every fragment had come so many seconds earlier.
    pub fn age_fragments(&mut self, seconds: u32) -> Result<()> {
        let mut firsts = self.hash::<FragmentKey, FragmentPorts>(map::FRAGMENTS)?;
        let entries: Vec<_> = firsts.iter().collect::<Result<_, _>>()?;
        for (key, ports) in entries {
            firsts.insert(
                key,
                FragmentPorts { received_at: ports.received_at.wrapping_sub(seconds), ..ports },
                0,
            )?;
        }
        let mut held = self.hash::<ReorderKey, [u32; 512]>(map::REORDER_FRAGMENTS)?;
        let entries: Vec<_> = held.iter().collect::<Result<_, _>>()?;
        for (key, mut fragment) in entries {
            fragment[0] = fragment[0].wrapping_sub(seconds);
            held.insert(key, fragment, 0)?;
        }
        Ok(())
    }

    /// Replies of this tuple are claimed by a processor that has not yet written their flow.
    pub fn claim_as_if_at_work(&mut self, src: SocketAddr, dst: SocketAddr, protocol: u8) -> Result<()> {
        // the one that is used last
        let slot = FLOWS - 1;
        self.array(map::FLOWS)?.set(slot, Flow { epoch: 1, ..Flow::default() }, 0)?;
        Ok(self.hash(map::FLOW_INDEX)?.insert(tuple(src, dst, protocol), FlowRef { slot, epoch: 2 }, 0)?)
    }

    /// The flow of packets of this tuple.
    pub fn flow_of(&mut self, src: SocketAddr, dst: SocketAddr, protocol: u8) -> Result<Flow> {
        let key = tuple(src, dst, protocol);
        let reference = self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.get(&key, 0)?;
        Ok(self.array(map::FLOWS)?.get(&reference.slot, 0)?)
    }

    /// Changes the stamps and the state of every flow, as time would.
    pub fn age_flows(&mut self, change: impl Fn(&mut Flow)) -> Result<()> {
        let mut flows = self.array::<Flow>(map::FLOWS)?;
        for slot in 0..FLOWS {
            let mut flow = flows.get(&slot, 0)?;
            if flow.epoch != 0 {
                change(&mut flow);
                flows.set(slot, flow, 0)?;
            }
        }
        Ok(())
    }
}

/// As the flow table's keys have it.
fn tuple(src: SocketAddr, dst: SocketAddr, protocol: u8) -> FlowKey {
    let (src_port, dst_port) = (Port::new(src.port()), Port::new(dst.port()));
    FlowKey::new(protocol, src.ip().into(), src_port, dst.ip().into(), dst_port)
}
