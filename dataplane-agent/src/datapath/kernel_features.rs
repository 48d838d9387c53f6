//! What the running kernel can do, found by trying.

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use dataplane_common::abi::NodeFlags;

/// The [`NodeFlags`] that depend on the kernel. Where it cannot be found out, the programs do
/// without.
pub fn flags() -> u32 {
    let helper = BpfHelper::BPF_FUNC_ktime_get_coarse_ns;
    match is_helper_supported(ProgramType::SchedClassifier, helper) {
        Ok(true) => NodeFlags::COARSE_CLOCK,
        Ok(false) => 0,
        Err(error) => {
            tracing::debug!("cannot find out whether the kernel has a coarse clock for programs: {error}");
            0
        }
    }
}
