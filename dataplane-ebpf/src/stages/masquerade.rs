//! Pods that talk to the outside do so as their node.

use dataplane_common::{abi::NodeFlags, reason::DropReason};

use super::{flow, translate::NewFlow};
use crate::{
    config,
    family::IpFamily,
    maps::{Purpose, Work},
    packet::Frame,
};

/// A flow under the node's address.
pub(crate) enum AsNode {}

impl NewFlow for AsNode {
    const KINDS: u32 = flow::kinds::MASQUERADE;

    #[inline(always)]
    fn open<F: IpFamily>(_ctx: &impl Frame, work: &mut Work) -> Result<bool, DropReason> {
        let node = F::node_address();
        if !config::flag(NodeFlags::MASQUERADE) || node.is_zero() {
            return Ok(false);
        }
        work.reply = work.from.reversed();
        work.purpose =
            Purpose { source: node, service_id: 0, backend_id: 0, backend_generation: 0, flags: 0 };
        flow::create(work)?;
        Ok(true)
    }
}
