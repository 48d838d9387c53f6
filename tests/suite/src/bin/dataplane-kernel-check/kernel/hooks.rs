//! Attaches programs to every hook with the agent's own loader, in a network namespace of this
//! thread.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use dataplane_agent::datapath::{
    AttachError, Attachment, Capacity, Datapath, DatapathConfig, EbpfLog, TcHooks, XdpState, XdpUse, cleanup,
    default_cgroup,
};
use nix::sched::{CloneFlags, unshare};

use super::{Finding, Findings};
use dataplane_testkit::prog::node_config;

/// A separate cgroup, so that the programs affect no other sockets.
const CGROUP: &str = "dataplane-kernel-check";

/// Attaches and detaches all programs.
pub(crate) fn hooks(findings: &mut Findings) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
    let directory = tempfile::tempdir()?;
    let found = attach(&directory.path().join("bpf"));
    cleanup(&directory.path().join("bpf")).context("detach the programs")?;
    found?.iter().try_for_each(|finding| findings.report(finding))
}

fn attach(bpffs: &Path) -> Result<Vec<Finding>> {
    let config = DatapathConfig {
        bpffs: bpffs.to_owned(),
        node: node_config(),
        capacity: Capacity { flows: 512, ..Capacity::default() },
        log: EbpfLog::Off,
        tc: TcHooks::Auto,
        xdp: XdpUse::Native,
    };
    let mut datapath = Datapath::load(&config)?;
    for link in
        ["pod0 type veth peer name pod1", "wire0 type veth peer name wire1", "overlay0 type vxlan external"]
    {
        ip(&format!("link add {link}"))?;
    }
    let device = |place, attached: Result<Attachment, AttachError>| match attached {
        Ok(attachment) => Finding::Hook { place, how: Some(how(attachment)), refused: None },
        Err(error) => Finding::Hook { place, how: None, refused: Some(error.to_string()) },
    };
    let mut found = vec![
        device("pod device", datapath.attach_pod("pod0")),
        device("uplink", datapath.attach_uplink("wire0")),
        device("overlay device", datapath.attach_overlay("overlay0")),
    ];
    found.push(match datapath.attach_xdp("wire0")? {
        XdpState::Native => Finding::Hook { place: "uplink's driver", how: Some("xdp"), refused: None },
        XdpState::Refused(reason) => {
            Finding::Hook { place: "uplink's driver", how: None, refused: Some(reason) }
        }
        XdpState::Off => anyhow::bail!("xdp is off"),
    });
    let cgroup = default_cgroup()?.join(CGROUP);
    fs::create_dir_all(&cgroup).with_context(|| format!("create cgroup {}", cgroup.display()))?;
    let attached = datapath.attach_cgroup(&cgroup).and_then(|()| datapath.detach_cgroup());
    fs::remove_dir(&cgroup).with_context(|| format!("remove cgroup {}", cgroup.display()))?;
    let (how, refused) = match attached {
        Ok(()) => (Some("link"), None),
        Err(error) => (None, Some(error.to_string())),
    };
    found.push(Finding::Hook { place: "cgroup", how, refused });
    Ok(found)
}

const fn how(attachment: Attachment) -> &'static str {
    match attachment {
        Attachment::Tcx | Attachment::TcxAdopted => "tcx",
        Attachment::Clsact | Attachment::ClsactAdopted => "clsact",
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = std::process::Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("run ip (package iproute2)")?;
    anyhow::ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
