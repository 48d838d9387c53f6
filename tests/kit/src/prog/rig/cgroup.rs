//! Attaches a rig's socket programs to a cgroup of its own, for real sockets of this process.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use aya::programs::{CgroupAttachMode, Program};
use dataplane_agent::datapath::default_cgroup;
use dataplane_common::abi::names::program;

use super::Rig;

/// A process is in one cgroup: tests of one process take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Sockets that this process creates while it exists run the rig's programs.
pub struct SocketPrograms {
    cgroup: PathBuf,
    before: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Rig {
    /// Moves this process to a new cgroup and attaches the socket programs there. They stay
    /// attached until the rig is dropped.
    pub fn attach_sockets(&mut self) -> Result<SocketPrograms> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let root = default_cgroup()?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup2")?;
        let cgroup = root.join(format!("dataplane-prog-{}", std::process::id()));
        fs::create_dir_all(&cgroup).with_context(|| format!("create cgroup {}", cgroup.display()))?;
        let entered = SocketPrograms { before: root.join(own), cgroup, _turn: turn };
        let directory = File::open(&entered.cgroup)?;
        for name in program::SOCKET {
            let program = self.ebpf.program_mut(name).context(name)?;
            dataplane_agent::datapath::loader::load_program(program)
                .with_context(|| format!("load {name}"))?;
            match program {
                Program::CgroupSockAddr(program) => {
                    program.attach(&directory, CgroupAttachMode::Single)?;
                }
                Program::CgroupSock(program) => {
                    program.attach(&directory, CgroupAttachMode::Single)?;
                }
                _ => bail!("{name} is not a socket program"),
            }
        }
        enter(&entered.cgroup)?;
        Ok(entered)
    }
}

impl Drop for SocketPrograms {
    fn drop(&mut self) {
        // the next test reports what is left behind
        if let Err(error) = enter(&self.before).and_then(|()| Ok(fs::remove_dir(&self.cgroup)?)) {
            eprintln!("leave cgroup {}: {error:#}", self.cgroup.display());
        }
    }
}

fn enter(cgroup: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("write {}", procs.display()))
}
