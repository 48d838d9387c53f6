//! Pods that talk to the outside do so as their node.

use dataplane_common::{
    abi::{FlowFlags, NodeFlags},
    reason::DropReason,
};

use super::{flow, translate::NewFlow};
use crate::{
    config,
    family::IpFamily,
    maps::{Purpose, Work},
};

/// A flow under the node's address.
pub(crate) enum AsNode {}

impl NewFlow for AsNode {
    #[inline(always)]
    fn begins_here(flags: u32) -> bool {
        flags & FlowFlags::SERVICE == 0
    }

    #[inline(always)]
    fn open<F: IpFamily>(work: &mut Work) -> Result<bool, DropReason> {
        let node = F::node_address();
        if !config::flag(NodeFlags::MASQUERADE) || node.is_unspecified() {
            return Ok(false);
        }
        work.reply = work.from.reversed();
        work.purpose =
            Purpose { source: node, service_id: 0, backend_id: 0, backend_generation: 0, flags: 0 };
        flow::create(work)?;
        Ok(true)
    }
}
