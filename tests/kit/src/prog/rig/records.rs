//! The flow table as it is, for a comparison with what it should be.

use anyhow::Result;
use dataplane_common::abi::{Flow, FlowKey, FlowRef, names::map};

use super::Rig;

impl Rig {
    /// The records of all slots.
    pub fn flow_records(&mut self) -> Result<Vec<Flow>> {
        let slots = self.flow_slots;
        let flows = self.array::<Flow>(map::FLOWS)?;
        (0..slots).map(|slot| Ok(flows.get(&slot, 0)?)).collect()
    }

    /// The flow index.
    pub fn flow_index(&mut self) -> Result<Vec<(FlowKey, FlowRef)>> {
        Ok(self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.iter().collect::<Result<_, _>>()?)
    }

    /// Empties the flow table.
    pub fn remove_flows(&mut self) -> Result<()> {
        for (key, _) in self.flow_index()? {
            self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.remove(&key)?;
        }
        for slot in 0..self.flow_slots {
            self.array(map::FLOWS)?.set(slot, Flow::default(), 0)?;
        }
        self.advance_generation()?;
        self.forget_slots()
    }
}
