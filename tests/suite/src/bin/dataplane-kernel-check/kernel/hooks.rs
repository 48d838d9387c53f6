//! Every place programs are attached to, by the agent's own loader, in a network namespace of this thread.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use dataplane_agent::datapath::{
    AttachError, Attachment, Capacity, Datapath, DatapathConfig, EbpfLog, TcHooks, XdpState, XdpUse, cleanup,
    default_cgroup,
};
use nix::sched::{CloneFlags, unshare};

use super::{Finding, Told};
use dataplane_testkit::prog::node_config;

/// Below the cgroup file system; a directory of our own, so that no socket but ours is looked at.
const CGROUP: &str = "dataplane-kernel-check";

/// Attaches all programs, and takes them off again.
pub(crate) fn hooks(told: &mut Told) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
    let directory = tempfile::tempdir()?;
    let found = attach(&directory.path().join("bpf"));
    cleanup(&directory.path().join("bpf")).context("take the programs off")?;
    found?.iter().try_for_each(|finding| told.tell(finding))
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
    fs::create_dir_all(&cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
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
