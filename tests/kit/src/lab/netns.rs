//! Network namespaces: created, configured, entered. Knows no nodes and pods.
//!
//! They are named (`/run/netns/<name>`), so that `ip netns exec` and a CNI plugin find them.
//! Devices are created inside namespaces: the root namespace never has one.

use std::{
    fs::{self, File},
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::losses::pairs_of_lines;

/// The directory of named namespaces.
const DIRECTORY: &str = "/run/netns";

/// A named network namespace. Dropping it does not remove it: see [`Namespace::delete`].
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Creates a namespace with loopback up; new devices skip duplicate address detection.
    pub fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let namespace = Self::open(name)?;
        namespace.sysctls(&[
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_ra", "0"),
        ])?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Opens an existing namespace.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).with_context(|| format!("open namespace {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path, also used as `CNI_NETNS`.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// An open file of the namespace; it works also after the name was deleted.
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Runs commands of `ip`, one per line, in one process; returns the output.
    pub fn ip(&self, commands: &str) -> Result<String> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run ip (package iproute2)")?;
        child.stdin.take().context("ip has no stdin")?.write_all(commands.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let problem = String::from_utf8_lossy(&output.stderr);
            bail!("namespace {}: ip {}: {}", self.name, commands.trim(), problem.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Gives a device an IPv4 address in a /24 and an IPv6 address in a /64.
    pub fn add_addresses(&self, device: &str, [v4, v6]: [IpAddr; 2]) -> Result<()> {
        let commands = format!("addr add {v4}/24 dev {device}\naddr add {v6}/64 dev {device} nodad");
        self.ip(&commands).map(drop)
    }

    /// Sets an offload feature of a device, for example `tx off`.
    pub fn offload(&self, device: &str, feature: &str, value: &str) -> Result<()> {
        self.enter(|| run(Command::new("ethtool").args(["-K", device, feature, value])))?
            .with_context(|| format!("ethtool in namespace {} (package ethtool)", self.name))
    }

    /// Runs `work` on a thread of this namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                setns(&*self.file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter namespace {}", self.name))?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes sysctls of this namespace: `/proc/sys` shows each thread its own namespace.
    pub fn sysctls(&self, values: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in values {
                let path = Path::new("/proc/sys").join(key);
                fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
            }
            Ok(())
        })?
    }

    /// Reads a file below `/proc/net` or `/proc/sys` in this namespace.
    pub fn read_proc(&self, path: &str) -> Result<String> {
        // `/proc/net` belongs to the main thread, `/proc/thread-self/net` to this one
        let path = match path.strip_prefix("/proc/net/") {
            Some(rest) => format!("/proc/thread-self/net/{rest}"),
            None => path.to_owned(),
        };
        self.enter(|| fs::read_to_string(&path).with_context(|| format!("read {path}")))?
    }

    /// Reads a counter of `/proc/net/snmp`, for example `Tcp`, `RetransSegs`.
    pub fn snmp(&self, protocol: &str, counter: &str) -> Result<u64> {
        let text = self.read_proc("/proc/net/snmp")?;
        let value = pairs_of_lines(&text).find(|(group, name, _)| (*group, *name) == (protocol, counter));
        Ok(value.with_context(|| format!("/proc/net/snmp has no {protocol} {counter}"))?.2.parse()?)
    }

    /// Deletes the name now; the kernel removes the namespace when the last process has left it.
    pub fn delete(name: &str) -> Result<()> {
        run(Command::new("ip").args(["netns", "del", name]))
    }

    /// Names of all namespaces that begin with `prefix`.
    pub fn all_named(prefix: &str) -> Result<Vec<String>> {
        let entries = match fs::read_dir(DIRECTORY) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context(DIRECTORY),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter(|name| name.starts_with(prefix)).collect())
    }
}

/// Creates a veth pair with one end in each of two namespaces.
pub(super) fn veth(a: (&Namespace, &str), b: (&Namespace, &str)) -> Result<()> {
    run(Command::new("ip").args([
        "link",
        "add",
        a.1,
        "netns",
        a.0.name(),
        "type",
        "veth",
        "peer",
        b.1,
        "netns",
        b.0.name(),
    ]))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().context("run ip (package iproute2)")?;
    if !output.status.success() {
        let problem = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}", problem.trim());
    }
    Ok(())
}
