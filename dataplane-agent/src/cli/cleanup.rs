//! `cleanup`: removes everything an agent ever made on this node, without an agent.
//!
//! Owns the order and the report. What is ours is known by name, kind, protocol number or place, never by memory, so
//! that it finds the remains of agents of other versions too, and finds nothing when it runs twice. Reserved ports go as far
//! as an agent noted that they are ours. Other sysctls stay as they are: nobody knows what they were.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use clap::Args;
use dataplane_cni::pending_deletes::DeletionQueue;

use crate::{
    api::instance::{self, InstanceError},
    cni::pods,
    config::CniPreset,
    datapath::{self, AttachError},
    lifecycle,
    netlink::{KernelRoute, Link, Netlink, NetlinkError, ReservedPorts, reserved_ports},
    source::kubernetes,
};

/// Below the BPF file system (see [`datapath::Pins`]).
const PINS: &str = "dataplane";

/// What to remove, and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct CleanupArgs {
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Even while an agent (or kube-proxy) is running
    #[arg(long)]
    pub force: bool,
    /// Remove what kube-proxy left in the kernel, and nothing of ours. Without --yes only says what would be removed
    #[arg(long)]
    pub kube_proxy: bool,
    /// Do remove it
    #[arg(long, requires = "kube_proxy")]
    pub yes: bool,
    /// Directory of the agent's socket
    #[arg(long, env = "DATAPLANE_RUN_DIR", default_value = "/run/dataplane")]
    pub run_dir: PathBuf,
    /// Directory of the agent's state
    #[arg(long, env = "DATAPLANE_STATE_DIR", default_value = "/var/lib/dataplane")]
    pub state_dir: PathBuf,
    /// BPF file system with the agent's pins
    #[arg(long, env = "DATAPLANE_BPFFS", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
    /// Name of the overlay device
    #[arg(long, env = "DATAPLANE_VXLAN_DEVICE", default_value = "dataplane0")]
    pub overlay_device: String,
    /// Whose directories the CNI plugin and its configuration went to: standard, microk8s or k3s
    #[arg(long, env = "DATAPLANE_CNI_PRESET", default_value = "standard")]
    pub cni_preset: CniPreset,
    /// Directory of CNI plugins [default: the preset's]
    #[arg(long, env = "DATAPLANE_CNI_BIN_DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Directory of CNI configurations [default: the preset's]
    #[arg(long, env = "DATAPLANE_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
}

/// Why not everything was removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error("an agent is running (pid {pid}): stop it first, or --force")]
    Running { pid: String },
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Datapath(#[from] AttachError),
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{0} things could not be removed")]
    Incomplete(usize),
}

/// Says what is done, as it is done, and remembers what failed.
struct Report<'a> {
    dry_run: bool,
    say: &'a mut dyn FnMut(&str),
    removed: usize,
    failed: usize,
}

/// Removes everything, telling `say` line by line. What fails does not keep the rest from being removed.
pub async fn cleanup(args: &CleanupArgs, say: &mut dyn FnMut(&str)) -> Result<(), CleanupError> {
    if let Some(pid) = instance::running(&args.run_dir)?
        && !args.force
    {
        return Err(CleanupError::Running { pid });
    }
    let mut report = Report { dry_run: args.dry_run, say, removed: 0, failed: 0 };
    // before anything: a runtime that finds a configuration adds pods
    cni_files(args, &mut report);
    // then pods: without their devices no packet is in flight when programs and tables go
    let network = network(args, &mut report).await;
    report.attempt("network", network);
    let datapath = programs(&args.bpffs, &mut report);
    report.attempt("datapath", datapath);
    // and then their ports: nobody answers for them any more
    reserved(args, &mut report);
    directories(args, &mut report);
    report.end()
}

/// Plugin and configuration, where they are ours.
fn cni_files(args: &CleanupArgs, report: &mut Report<'_>) {
    let preset = args.cni_preset;
    let bin_dir = args.cni_bin_dir.as_deref().unwrap_or(Path::new(preset.bin_dir()));
    let conf_dir = args.cni_conf_dir.as_deref().unwrap_or(Path::new(preset.conf_dir()));
    for path in lifecycle::ours(bin_dir, conf_dir) {
        file(&path, report);
    }
}

/// Without their devices, records and notes of pods are of no use to an agent to come, nor is what the cluster was.
fn directories(args: &CleanupArgs, report: &mut Report<'_>) {
    for path in instance::leftovers(&args.run_dir) {
        file(&path, report);
    }
    let records = args.state_dir.join(pods::DIRECTORY);
    files("records of pods", &records, report);
    for path in kubernetes::files(&args.state_dir) {
        file(&path, report);
    }
    let notes = DeletionQueue::in_run_dir(&args.run_dir);
    files("notes of pods", notes.directory(), report);
    for directory in [&records, notes.directory(), &args.run_dir, &args.state_dir] {
        empty_directory(directory, report);
    }
}

fn reserved(args: &CleanupArgs, report: &mut Report<'_>) {
    let note = reserved_ports::file(&args.run_dir);
    if note.exists() && report.begins(&"reserved ports") {
        let released = ReservedPorts::open(&args.run_dir).set(&BTreeSet::new());
        let gone = released.map_err(|error| error.to_string());
        report.done(gone.and_then(|_| fs::remove_file(&note).map_err(|error| error.to_string())));
    }
}

async fn network(args: &CleanupArgs, report: &mut Report<'_>) -> Result<(), CleanupError> {
    let netlink = Netlink::connect()?;
    // routes before devices: deleting a device takes its routes along, and they are to be named
    for route in netlink.agent_routes().await? {
        let KernelRoute { destination, .. } = route;
        if report.begins(&format_args!("route {route}")) {
            report.done(netlink.remove_route(destination).await);
        }
    }
    for link in netlink.links().await? {
        if !is_ours(&link, &args.overlay_device) {
            continue;
        }
        for neighbour in netlink.permanent_neighbours(link.ifindex).await? {
            if report.begins(&format_args!("neighbour {} on {}", neighbour.address, link.name)) {
                report.done(netlink.remove_neighbour(link.ifindex, neighbour.address).await);
            }
        }
        if report.begins(&format_args!("device {}", link.name)) {
            report.done(netlink.delete_link(&link).await);
        }
    }
    Ok(())
}

/// A pod's device (by name, kind and link address: a name alone could be chance) or the overlay device.
fn is_ours(link: &Link, overlay: &str) -> bool {
    link.is_pod_device() || (link.name == overlay && link.is_vxlan())
}

fn programs(bpffs: &Path, report: &mut Report<'_>) -> Result<(), CleanupError> {
    if !report.dry_run {
        for removed in datapath::cleanup(bpffs)? {
            report.removed += 1;
            (report.say)(&format!("removed {removed}"));
        }
        return Ok(());
    }
    let mut pins = Vec::new();
    walk(&bpffs.join(PINS), &mut pins)?;
    for pin in pins {
        report.begins(&format_args!("pin {}", pin.display()));
    }
    (report.say)(
        "would remove our clsact filters (priority 1, handle 0xda7a) from every device that has them",
    );
    Ok(())
}

/// Files below a directory, which may be absent.
fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), CleanupError> {
    for path in entries(directory)? {
        if path.is_dir() {
            walk(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// All there is in a directory, which may be absent.
fn files(what: &str, directory: &Path, report: &mut Report<'_>) {
    match entries(directory) {
        Ok(paths) => paths.iter().for_each(|path| file(path, report)),
        Err(error) => report.attempt(what, Err(error)),
    }
}

fn file(path: &Path, report: &mut Report<'_>) {
    if fs::symlink_metadata(path).is_ok() && report.begins(&path.display()) {
        report.done(fs::remove_file(path));
    }
}

/// Removes a directory nobody else has put anything into.
fn empty_directory(path: &Path, report: &mut Report<'_>) {
    if !report.dry_run && entries(path).is_ok_and(|entries| entries.is_empty()) && path.is_dir() {
        report.begins(&path.display());
        report.done(fs::remove_dir(path));
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, CleanupError> {
    let failed = |source| CleanupError::Io { operation: "read", path: directory.to_owned(), source };
    let mut paths = match fs::read_dir(directory) {
        Ok(entries) => {
            entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().map_err(failed)?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    paths.sort();
    Ok(paths)
}

impl Report<'_> {
    /// Says that `what` goes. True if it is to be removed.
    fn begins(&mut self, what: &dyn fmt::Display) -> bool {
        self.removed += 1;
        (self.say)(&if self.dry_run { format!("would remove {what}") } else { format!("remove {what}") });
        !self.dry_run
    }

    /// Says if the removal that was begun failed.
    fn done<E: fmt::Display>(&mut self, result: Result<(), E>) {
        if let Err(error) = result {
            self.removed -= 1;
            self.failed += 1;
            (self.say)(&format!("  failed: {error}"));
        }
    }

    fn attempt(&mut self, what: &str, result: Result<(), CleanupError>) {
        if let Err(error) = result {
            self.failed += 1;
            (self.say)(&format!("{what}: {error}"));
        }
    }

    fn end(self) -> Result<(), CleanupError> {
        match (self.failed, self.removed, self.dry_run) {
            (0, 0, _) => (self.say)("nothing of ours is here"),
            (0, removed, true) => (self.say)(&format!("would remove {removed} things")),
            (0, removed, false) => (self.say)(&format!("removed {removed} things")),
            (failed, ..) => return Err(CleanupError::Incomplete(failed)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use dataplane_cni::protocol::Attachment;

    use super::*;

    #[test]
    fn directories_go_with_all_that_agent_and_plugin_put_there() {
        let node = tempfile::tempdir().unwrap();
        let (run_dir, state_dir) = (node.path().join("run"), node.path().join("state"));
        let args = |dry_run| CleanupArgs {
            dry_run,
            force: false,
            run_dir: run_dir.clone(),
            state_dir: state_dir.clone(),
            bpffs: node.path().join("bpf"),
            overlay_device: String::new(),
            kube_proxy: false,
            yes: false,
            cni_preset: CniPreset::Standard,
            cni_bin_dir: Some(node.path().join("bin")),
            cni_conf_dir: Some(node.path().join("net.d")),
        };
        fs::create_dir_all(&run_dir).unwrap();
        fs::create_dir_all(state_dir.join(pods::DIRECTORY)).unwrap();
        fs::write(state_dir.join(pods::DIRECTORY).join("dpa.json"), "").unwrap();
        fs::write(run_dir.join("agent.lock"), "").unwrap();
        fs::write(state_dir.join("cluster.jsonl"), "").unwrap();
        let gone = Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() };
        DeletionQueue::in_run_dir(&run_dir).add(&gone).unwrap();
        for (directory, name, text) in [
            ("bin", "dataplane-cni", ""),
            ("net.d", "05-dataplane.conflist", "dataplane-cni"),
            ("net.d", "10-x.conf", ""),
        ] {
            fs::create_dir_all(node.path().join(directory)).unwrap();
            fs::write(node.path().join(directory).join(name), text).unwrap();
        }
        let mut said = Vec::new();
        let mut run = |dry_run| {
            let mut say = |line: &str| said.push(line.to_owned());
            let mut report = Report { dry_run, say: &mut say, removed: 0, failed: 0 };
            cni_files(&args(dry_run), &mut report);
            directories(&args(dry_run), &mut report);
            report.end()
        };
        run(true).unwrap();
        assert!(run_dir.join("gone/c1@eth0").exists());
        run(false).unwrap();
        assert!(!run_dir.exists() && !state_dir.exists(), "{said:?}");
        assert!(
            !node.path().join("bin/dataplane-cni").exists()
                && !node.path().join("net.d/05-dataplane.conflist").exists()
        );
        assert!(node.path().join("net.d/10-x.conf").exists(), "somebody else's");
        assert!(
            said.contains(&format!("would remove {}", run_dir.join("gone/c1@eth0").display())),
            "{said:?}"
        );
    }
}
