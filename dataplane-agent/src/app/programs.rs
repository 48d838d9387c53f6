//! The programs before there is a node for them.

use dataplane_common::abi::names::map;

use super::{datapath::StartError, network_plan::constants};
use crate::{
    config::Config,
    datapath::{Datapath, DatapathConfig, EbpfLog, TcHooks},
};

/// Programs that are loaded and hooked to nothing yet, and tables that are adopted or empty.
pub(super) struct LoadedPrograms {
    pub(super) datapath: Datapath,
    pub(super) pins_adopted: u32,
}

impl LoadedPrograms {
    /// Loads the datapath: seconds of the verifier's time, for which nothing needs to be known of the node.
    pub(super) fn load(config: &Config) -> Result<Self, StartError> {
        let wanted = DatapathConfig {
            bpffs: config.bpffs.clone(),
            node: constants(config),
            capacity: config.capacity,
            log: config.log_ebpf,
            tc: TcHooks::Auto,
            xdp: config.xdp,
        };
        let pins = crate::datapath::Pins::new(&config.bpffs);
        let pins_adopted = map::PINNED.iter().filter(|name| pins.map(name).exists()).count() as u32;
        let mut datapath = Datapath::load(&wanted)?;
        for problem in datapath.problems() {
            tracing::warn!(problem, "datapath");
        }
        tracing::info!(adopted = pins_adopted, "datapath loaded");
        if config.log_ebpf != EbpfLog::Off
            && let Err(error) = datapath.forward_log()
        {
            tracing::warn!(%error, "the programs' log is not forwarded");
        }
        Ok(Self { datapath, pins_adopted })
    }
}
