//! `cleanup --kube-proxy`: removes what kube-proxy left in the kernel, and nothing else.
//!
//! First says what would go; only `--yes` removes it. Owns the words; what is kube-proxy's is
//! [`lifecycle::kube_proxy`](crate::lifecycle::kube_proxy)'s to know. Our own things are not touched, and an agent may run.

use crate::lifecycle::kube_proxy::{Leftovers, LeftoversError, running};

/// Why it was not removed.
#[derive(Debug, thiserror::Error)]
pub enum KubeProxyError {
    #[error(transparent)]
    Leftovers(#[from] LeftoversError),
    #[error("kube-proxy runs here (mode {0}) and would write its rules again: stop it first, or --force")]
    Running(String),
    #[error("some are there still ({0}): somebody writes them again")]
    Again(String),
}

/// Whether to do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resolve {
    pub(super) yes: bool,
    pub(super) force: bool,
}

/// Tells `say` what would be removed, or is.
pub(super) fn clean(resolve: Resolve, say: &mut dyn FnMut(&str)) -> Result<(), KubeProxyError> {
    let mode = running();
    let found = Leftovers::find()?;
    if let Some(mode) = mode {
        if resolve.yes && !resolve.force {
            return Err(KubeProxyError::Running(mode));
        }
        say(&format!("kube-proxy runs here (mode {mode}): it would write its rules again"));
    }
    let lines = found.lines();
    let verb = if resolve.yes { "remove" } else { "would remove" };
    for line in &lines {
        say(&format!("{verb} {line}"));
    }
    if found.ipvs {
        say(
            "there are IPVS virtual servers, kube-proxy's or not: `ipvsadm -C` removes all of them; left alone",
        );
    }
    match (lines.len(), resolve.yes) {
        (0, _) => say("nothing of kube-proxy's is here"),
        (count, false) => say(&format!("would remove {count} things: --yes removes them")),
        (count, true) => {
            found.remove()?;
            let left = Leftovers::find()?;
            if !left.is_empty() {
                return Err(KubeProxyError::Again(left.summary()));
            }
            say(&format!("removed {count} things"));
        }
    }
    Ok(())
}
