//! `cleanup --kube-proxy`: removes rules that kube-proxy left in the kernel, and nothing else.
//!
//! Prints them; removes them only with `--yes`.
//! [`lifecycle::kube_proxy`](crate::lifecycle::kube_proxy) finds and removes them. The agent may
//! run at the same time.

use crate::lifecycle::kube_proxy::{Leftovers, LeftoversError, running_mode};

/// Error of `cleanup --kube-proxy`.
#[derive(Debug, thiserror::Error)]
pub enum KubeProxyError {
    #[error(transparent)]
    Leftovers(#[from] LeftoversError),
    #[error(
        "kube-proxy is running (mode {0}) and would write its rules again; stop it first, or use --force"
    )]
    Running(String),
    #[error("rules are back after removal ({0}); stop the process that writes them")]
    Again(String),
}

/// Flags of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) yes: bool,
    pub(super) force: bool,
}

/// Finds and removes leftovers; passes each line of output to `print`.
pub(super) fn clean(flags: Flags, print: &mut dyn FnMut(&str)) -> Result<(), KubeProxyError> {
    let mode = running_mode();
    let found = Leftovers::find()?;
    if let Some(mode) = mode {
        if flags.yes && !flags.force {
            return Err(KubeProxyError::Running(mode));
        }
        print(&format!("kube-proxy is running (mode {mode}): it would write its rules again"));
    }
    let lines = found.lines();
    let verb = if flags.yes { "remove" } else { "would remove" };
    for line in &lines {
        print(&format!("{verb} {line}"));
    }
    if found.ipvs {
        print("not removed: IPVS virtual servers, which may be of another program; `ipvsadm -C` removes all");
    }
    match (lines.len(), flags.yes) {
        (0, _) => print("nothing to remove: kube-proxy left no rules"),
        (count, false) => print(&format!("would remove {count} items; --yes removes them")),
        (count, true) => {
            found.remove()?;
            let remaining = Leftovers::find()?;
            if !remaining.is_empty() {
                return Err(KubeProxyError::Again(remaining.summary()));
            }
            print(&format!("removed {count} items"));
        }
    }
    Ok(())
}
