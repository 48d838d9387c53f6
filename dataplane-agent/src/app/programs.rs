//! The loaded eBPF programs, before they are attached.

use std::collections::BTreeSet;

use super::{datapath::StartError, network_plan::constants};
use crate::{
    config::Config,
    datapath::{Datapath, DatapathConfig, EbpfLog, TcHooks, table::Table as _},
};

/// Programs that are loaded but not attached, and their tables: adopted from pins, or empty.
pub(super) struct LoadedPrograms {
    pub(super) datapath: Datapath,
    pub(super) pins_adopted: u32,
}

impl LoadedPrograms {
    /// Loads the programs, or opens those that an earlier agent loaded. Loading takes up to seconds
    /// (verifier); needs nothing of the Node object.
    pub(super) fn load(config: &Config) -> Result<Self, StartError> {
        let wanted = DatapathConfig {
            bpffs: config.bpffs.clone(),
            node: constants(config),
            capacity: config.capacity,
            log: config.log_ebpf,
            tc: TcHooks::Auto,
            xdp: config.xdp,
        };
        let datapath = Datapath::load(&wanted)?;
        for problem in datapath.problems() {
            tracing::warn!("datapath: {problem}");
        }
        let pins_adopted = datapath.adopted();
        let how = if datapath.reuses_programs() { "re-used the pinned" } else { "loaded the" };
        tracing::info!("{how} eBPF programs; adopted {pins_adopted} pinned tables");
        if config.log_ebpf != EbpfLog::Off
            && let Err(error) = datapath.forward_log()
        {
            tracing::warn!(%error, "cannot forward the log of the eBPF programs (key log_ebpf)");
        }
        Ok(Self { datapath, pins_adopted })
    }

    /// Indexes of the uplinks of an earlier agent.
    pub(super) fn uplink_indexes(&self) -> Result<BTreeSet<u32>, StartError> {
        Ok(self.datapath.devices()?.entries()?.into_iter().map(|(ifindex, _)| ifindex).collect())
    }
}
