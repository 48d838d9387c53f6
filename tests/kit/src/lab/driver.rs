//! The other end of an uplink whose driver runs a program.
//!
//! A pair's end that turns packets round is only heard by an end that has a program too (`drivers/net/veth.c`,
//! `veth_xdp_flush`): the datapath's own, with empty tables, lets everything pass.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Xdp, XdpMode, xdp::XdpLinkId},
};
use dataplane_common::abi::names::{NODE, map, program};

use super::netns::Namespace;
use crate::prog::node_config;

/// The large ones of the tables.
const EMPTY: [&str; 10] = [
    map::ENDPOINTS,
    map::SERVICES,
    map::BACKENDS,
    map::BACKEND_GENERATIONS,
    map::FLOW_INDEX,
    map::FLOWS,
    map::FLOW_SLOTS,
    map::DATAGRAM_ORIGINS,
    map::AFFINITY,
    map::FRAGMENTS,
];

/// Programs on ports, which go with it.
#[derive(Debug)]
pub(super) struct Ports {
    ebpf: Ebpf,
    links: BTreeMap<String, XdpLinkId>,
}

impl Ports {
    pub(super) fn load() -> Result<Self> {
        let node = node_config();
        let mut loader = EbpfLoader::new();
        loader.override_global(NODE, &node, true).override_global("AYA_LOG_LEVEL", &0_u8, false);
        for name in EMPTY {
            loader.map_max_entries(name, 1);
        }
        let mut ebpf = loader.load(dataplane_agent::datapath::OBJECT).context("load the object")?;
        xdp(&mut ebpf)?.load().context("load the program of a port")?;
        Ok(Self { ebpf, links: BTreeMap::new() })
    }

    pub(super) fn attach(&mut self, namespace: &Namespace, device: &str) -> Result<()> {
        let program = xdp(&mut self.ebpf)?;
        let link = namespace
            .enter(|| program.attach(device, XdpMode::Driver))?
            .with_context(|| format!("the driver of {device}"))?;
        self.links.insert(device.to_owned(), link);
        Ok(())
    }

    /// Takes the program off a port, if it has one.
    pub(super) fn detach(&mut self, device: &str) -> Result<()> {
        match self.links.remove(device) {
            Some(link) => xdp(&mut self.ebpf)?.detach(link).with_context(|| format!("leave {device}")),
            None => Ok(()),
        }
    }
}

fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut(program::XDP_WIRE).context(program::XDP_WIRE)?.try_into()?)
}
