//! `cleanup`: removes everything that agents of any version created on this node. Needs no running
//! agent.
//!
//! Devices, routes, programs and files are recognised by name, kind, protocol number or path, so
//! that a second run finds nothing. Reserved ports are removed as far as an agent recorded them.
//! Other sysctls stay: their old values are unknown.

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

/// Directory below the BPF file system (see [`datapath::Pins`]).
const PINS: &str = "dataplane";

/// Arguments of `cleanup`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[expect(clippy::struct_excessive_bools, reason = "command line flags")]
pub struct CleanupArgs {
    /// Only print what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Clean up even while an agent or kube-proxy is running
    #[arg(long)]
    pub force: bool,
    /// Remove rules left by kube-proxy instead; without --yes only print them
    #[arg(long)]
    pub kube_proxy: bool,
    /// Confirm the removal of rules left by kube-proxy
    #[arg(long, requires = "kube_proxy")]
    pub yes: bool,
    /// Directory of the API socket
    #[arg(long, env = "DATAPLANE_RUN_DIR", default_value = "/run/dataplane")]
    pub run_dir: PathBuf,
    /// Directory of the agent's state
    #[arg(long, env = "DATAPLANE_STATE_DIR", default_value = "/var/lib/dataplane")]
    pub state_dir: PathBuf,
    /// Mount point of the BPF file system
    #[arg(long, env = "DATAPLANE_BPFFS", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
    /// Name of the overlay device (vxlan.device)
    #[arg(long, env = "DATAPLANE_VXLAN_DEVICE", default_value = "dataplane0")]
    pub vxlan_device: String,
    /// Distribution whose CNI directories were used: standard, microk8s or k3s
    #[arg(long, env = "DATAPLANE_CNI_PRESET", default_value = "standard")]
    pub cni_preset: CniPreset,
    /// Directory of CNI plugins [default: the preset's]
    #[arg(long, env = "DATAPLANE_CNI_BIN_DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Directory of CNI configurations [default: the preset's]
    #[arg(long, env = "DATAPLANE_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
}

/// Error of `cleanup`.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error("an agent is running (pid {pid}); stop it first, or use --force")]
    Running { pid: String },
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Datapath(#[from] AttachError),
    #[error("cannot {operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{0} items could not be removed; see the errors above, then run cleanup again")]
    Incomplete(usize),
}

/// Prints each removal, and counts failures.
struct Report<'a> {
    dry_run: bool,
    print: &'a mut dyn FnMut(&str),
    removed: usize,
    failed: usize,
}

/// Removes everything, and passes each line of output to `print`. A failure does not stop the rest.
pub async fn cleanup(args: &CleanupArgs, print: &mut dyn FnMut(&str)) -> Result<(), CleanupError> {
    if let Some(pid) = instance::running(&args.run_dir)?
        && !args.force
    {
        return Err(CleanupError::Running { pid });
    }
    let mut report = Report { dry_run: args.dry_run, print, removed: 0, failed: 0 };
    // first: without the CNI configuration, the runtime adds no pods
    cni_files(args, &mut report);
    // pod devices before programs and tables: no packet is in flight when those are removed
    let network = network(args, &mut report).await;
    report.check("network", network);
    let datapath = programs(&args.bpffs, &mut report);
    report.check("datapath", datapath);
    // ports are released when no program uses them any more
    reserved_ports_of_agent(args, &mut report);
    directories(args, &mut report);
    report.finish()
}

/// CNI plugin and configuration, if they are ours.
fn cni_files(args: &CleanupArgs, report: &mut Report<'_>) {
    let preset = args.cni_preset;
    let bin_dir = args.cni_bin_dir.as_deref().unwrap_or(Path::new(preset.bin_dir()));
    let conf_dir = args.cni_conf_dir.as_deref().unwrap_or(Path::new(preset.conf_dir()));
    for path in lifecycle::installed_files(bin_dir, conf_dir) {
        remove_file(&path, report);
    }
}

/// Pod records, pending deletes and the cached cluster state: useless without the devices.
fn directories(args: &CleanupArgs, report: &mut Report<'_>) {
    for path in instance::leftovers(&args.run_dir) {
        remove_file(&path, report);
    }
    let records = args.state_dir.join(pods::DIRECTORY);
    remove_files("pod records", &records, report);
    for path in kubernetes::files(&args.state_dir) {
        remove_file(&path, report);
    }
    let pending = DeletionQueue::in_run_dir(&args.run_dir);
    remove_files("pending pod deletions", pending.directory(), report);
    for directory in [&records, pending.directory(), &args.run_dir, &args.state_dir] {
        remove_empty_directory(directory, report);
    }
}

fn reserved_ports_of_agent(args: &CleanupArgs, report: &mut Report<'_>) {
    let record = reserved_ports::file(&args.run_dir);
    if record.exists() && report.start(&"reserved ports") {
        let released = ReservedPorts::open(&args.run_dir).set(&BTreeSet::new());
        let released = released.map_err(|error| error.to_string());
        report.done(released.and_then(|_| fs::remove_file(&record).map_err(|error| error.to_string())));
    }
}

async fn network(args: &CleanupArgs, report: &mut Report<'_>) -> Result<(), CleanupError> {
    let netlink = Netlink::connect()?;
    // routes before devices: deleting a device deletes its routes without listing them
    for route in netlink.agent_routes().await? {
        let KernelRoute { destination, .. } = route;
        if report.start(&format_args!("route {route}")) {
            report.done(netlink.remove_route(destination).await);
        }
        if let Some(neighbour) = route.neighbour()
            && report.start(&format_args!("neighbour {}", neighbour.address))
        {
            report.done(netlink.remove_neighbour(neighbour.ifindex, neighbour.address).await);
        }
    }
    for link in netlink.links().await? {
        if !is_agent_link(&link, &args.vxlan_device) {
            continue;
        }
        for neighbour in netlink.permanent_neighbours(link.ifindex).await? {
            if report.start(&format_args!("neighbour {} on {}", neighbour.address, link.name)) {
                report.done(netlink.remove_neighbour(link.ifindex, neighbour.address).await);
            }
        }
        if report.start(&format_args!("device {}", link.name)) {
            report.done(netlink.delete_link(&link).await);
        }
    }
    Ok(())
}

/// True for pod devices (by name, kind and MAC address) and for the overlay device.
fn is_agent_link(link: &Link, overlay: &str) -> bool {
    link.is_pod_device() || (link.name == overlay && link.is_vxlan())
}

fn programs(bpffs: &Path, report: &mut Report<'_>) -> Result<(), CleanupError> {
    if !report.dry_run {
        for removed in datapath::cleanup(bpffs)? {
            report.removed += 1;
            (report.print)(&format!("removed {removed}"));
        }
        return Ok(());
    }
    let mut pins = Vec::new();
    walk(&bpffs.join(PINS), &mut pins)?;
    for pin in pins {
        report.start(&format_args!("pin {}", pin.display()));
    }
    (report.print)("would remove clsact filters of the agent (priority 1, handle 0xda7a) from every device");
    Ok(())
}

/// Collects the files below a directory, which may be absent.
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

/// Removes all files in a directory, which may be absent.
fn remove_files(what: &str, directory: &Path, report: &mut Report<'_>) {
    match entries(directory) {
        Ok(paths) => paths.iter().for_each(|path| remove_file(path, report)),
        Err(error) => report.check(what, Err(error)),
    }
}

fn remove_file(path: &Path, report: &mut Report<'_>) {
    if fs::symlink_metadata(path).is_ok() && report.start(&path.display()) {
        report.done(fs::remove_file(path));
    }
}

/// Removes a directory if it is empty.
fn remove_empty_directory(path: &Path, report: &mut Report<'_>) {
    if !report.dry_run && entries(path).is_ok_and(|entries| entries.is_empty()) && path.is_dir() {
        report.start(&path.display());
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
    /// Prints `what`. Returns true if it must be removed (no dry run).
    fn start(&mut self, what: &dyn fmt::Display) -> bool {
        self.removed += 1;
        (self.print)(&if self.dry_run { format!("would remove {what}") } else { format!("remove {what}") });
        !self.dry_run
    }

    /// Records the result of the removal that was started last.
    fn done<E: fmt::Display>(&mut self, result: Result<(), E>) {
        if let Err(error) = result {
            self.removed -= 1;
            self.failed += 1;
            (self.print)(&format!("  failed: {error}"));
        }
    }

    /// Records the error of a whole step.
    fn check(&mut self, what: &str, result: Result<(), CleanupError>) {
        if let Err(error) = result {
            self.failed += 1;
            (self.print)(&format!("cannot clean up {what}: {error}"));
        }
    }

    fn finish(self) -> Result<(), CleanupError> {
        match (self.failed, self.removed, self.dry_run) {
            (0, 0, _) => (self.print)("nothing to remove"),
            (0, removed, true) => (self.print)(&format!("would remove {removed} items")),
            (0, removed, false) => (self.print)(&format!("removed {removed} items")),
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
    fn cleanup_removes_files_of_agent_and_plugin_but_not_of_others() {
        let node = tempfile::tempdir().unwrap();
        let (run_dir, state_dir) = (node.path().join("run"), node.path().join("state"));
        let args = |dry_run| CleanupArgs {
            dry_run,
            force: false,
            run_dir: run_dir.clone(),
            state_dir: state_dir.clone(),
            bpffs: node.path().join("bpf"),
            vxlan_device: String::new(),
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
        let mut output = Vec::new();
        let mut run = |dry_run| {
            let mut print = |line: &str| output.push(line.to_owned());
            let mut report = Report { dry_run, print: &mut print, removed: 0, failed: 0 };
            cni_files(&args(dry_run), &mut report);
            directories(&args(dry_run), &mut report);
            report.finish()
        };
        run(true).unwrap();
        assert!(run_dir.join("gone/c1@eth0").exists());
        run(false).unwrap();
        assert!(!run_dir.exists() && !state_dir.exists(), "{output:?}");
        assert!(
            !node.path().join("bin/dataplane-cni").exists()
                && !node.path().join("net.d/05-dataplane.conflist").exists()
        );
        assert!(node.path().join("net.d/10-x.conf").exists(), "a file of another plugin");
        assert!(
            output.contains(&format!("would remove {}", run_dir.join("gone/c1@eth0").display())),
            "{output:?}"
        );
    }
}
