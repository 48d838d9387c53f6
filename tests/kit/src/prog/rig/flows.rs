//! Reads flows and fragments that the programs wrote, and changes them as time or another CPU
//! would.

use std::{collections::HashSet, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::{MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use dataplane_common::abi::{
    Flow, FlowBlock, FlowFlags, FlowKey, FlowRef, FragmentKey, FragmentedPacket, Port, ReorderKey, names::map,
};

use super::Rig;

impl Rig {
    /// All flows. The index has both tuples of each, or only the forward tuple of a direct one.
    ///
    /// # Errors
    /// Also if the index is inconsistent: a tuple without its flow, or a flow with one tuple.
    pub fn flows(&mut self) -> Result<Vec<Flow>> {
        let index: Vec<(FlowKey, FlowRef)> =
            self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.iter().collect::<Result<_, _>>()?;
        let keys: HashSet<&FlowKey> = index.iter().map(|(key, _)| key).collect();
        let mut flows = Vec::new();
        for (key, reference) in &index {
            let flow: Flow = self.array(map::FLOWS)?.get(&reference.slot, 0)?;
            ensure!(flow.epoch == reference.epoch, "{key:?} refers to a flow of another epoch");
            ensure!(
                flow.forward == *key || flow.reply == *key,
                "{key:?} refers to a flow that does not have this tuple"
            );
            if flow.forward == *key {
                // replies of a direct flow take a path without this node
                let is_direct = flow.flags & FlowFlags::DIRECT != 0;
                let has_reply_tuple = keys.contains(&flow.reply);
                ensure!(
                    is_direct != has_reply_tuple,
                    "{key:?}: reply tuple missing, or present for a direct flow"
                );
                flows.push(flow);
            } else {
                // the forward tuple may belong to a newer flow that reuses the ports or has another
                // backend, while replies of the old flow are still translated
                ensure!(keys.contains(&flow.forward), "{key:?}: forward tuple missing");
            }
        }
        Ok(flows)
    }

    /// The fragments that wait for the first one.
    pub fn pending_fragments(&mut self) -> Result<Vec<ReorderKey>> {
        // only the size of the value matters
        let pending = self.hash::<ReorderKey, [u32; 512]>(map::REORDER_FRAGMENTS)?;
        Ok(pending.keys().collect::<Result<_, _>>()?)
    }

    /// Makes every fragment `seconds` older.
    pub fn age_fragments(&mut self, seconds: u32) -> Result<()> {
        let mut firsts = self.hash::<FragmentKey, FragmentedPacket>(map::FRAGMENTED_PACKETS)?;
        let entries: Vec<_> = firsts.iter().collect::<Result<_, _>>()?;
        for (key, ports) in entries {
            firsts.insert(
                key,
                FragmentedPacket { received_at: ports.received_at.wrapping_sub(seconds), ..ports },
                0,
            )?;
        }
        let mut pending = self.hash::<ReorderKey, [u32; 512]>(map::REORDER_FRAGMENTS)?;
        let entries: Vec<_> = pending.iter().collect::<Result<_, _>>()?;
        for (key, mut fragment) in entries {
            fragment[0] = fragment[0].wrapping_sub(seconds);
            pending.insert(key, fragment, 0)?;
        }
        Ok(())
    }

    /// Inserts the reply tuple of a flow that another CPU has not written yet.
    pub fn insert_unwritten_flow(&mut self, src: SocketAddr, dst: SocketAddr, protocol: u8) -> Result<()> {
        // the slot that is allocated last
        let slot = self.flow_slots - 1;
        self.array(map::FLOWS)?.set(slot, Flow { epoch: 1, ..Flow::default() }, 0)?;
        Ok(self.hash(map::FLOW_INDEX)?.insert(tuple(src, dst, protocol), FlowRef { slot, epoch: 2 }, 0)?)
    }

    /// The flow of this tuple.
    pub fn flow_of(&mut self, src: SocketAddr, dst: SocketAddr, protocol: u8) -> Result<Flow> {
        let key = tuple(src, dst, protocol);
        let reference = self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.get(&key, 0)?;
        Ok(self.array(map::FLOWS)?.get(&reference.slot, 0)?)
    }

    /// Applies `change` to every flow, for example to make it older.
    pub fn age_flows(&mut self, change: impl Fn(&mut Flow)) -> Result<()> {
        let slots = self.flow_slots;
        let mut flows = self.array::<Flow>(map::FLOWS)?;
        for slot in 0..slots {
            let mut flow = flows.get(&slot, 0)?;
            if flow.epoch != 0 {
                change(&mut flow);
                flows.set(slot, flow, 0)?;
            }
        }
        self.forget_slots()
    }

    /// Makes the programs examine every slot again, as after a second.
    pub fn forget_slots(&mut self) -> Result<()> {
        let count = FlowBlock::count(self.flow_slots);
        let mut blocks = self.array::<FlowBlock>(map::FLOW_BLOCKS)?;
        for block in 0..count {
            blocks.set(block, FlowBlock::default(), 0)?;
        }
        let search = self.ebpf.map_mut("FLOW_SEARCH").context("FLOW_SEARCH")?;
        let mut search: PerCpuArray<&mut MapData, [u32; 12]> = PerCpuArray::try_from(search)?;
        Ok(search.set(
            0,
            PerCpuValues::try_from(vec![[0; 12]; nr_cpus().map_err(|(_, error)| error)?])?,
            0,
        )?)
    }
}

/// A key of the flow index.
fn tuple(src: SocketAddr, dst: SocketAddr, protocol: u8) -> FlowKey {
    let (src_port, dst_port) = (Port::new(src.port()), Port::new(dst.port()));
    FlowKey::new(protocol, src.ip().into(), src_port, dst.ip().into(), dst_port)
}
