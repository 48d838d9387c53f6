//! Others who did this before: kube-proxy, flannel, Calico, Weave. What of them is still on the node, and what to do.
//!
//! Only looks. Finds devices, rules and directories: processes may be out of sight. Removes nothing: `cleanup
//! --kube-proxy` does for kube-proxy, and whoever installed the others knows how.

use std::path::Path;

use super::{
    kube_proxy::{Leftovers, running},
    problems::problem,
};
use crate::{
    api::views::ProblemView,
    netlink::{Link, Netlink},
};

/// A network that was here before.
struct Other {
    name: &'static str,
    /// Devices, by name or (with a star at the end) by how it begins.
    devices: &'static [&'static str],
    /// Made by the kernel too, by itself: mean something only while they are up.
    shared: &'static [&'static str],
    directories: &'static [&'static str],
}

const OTHERS: [Other; 3] = [
    Other {
        name: "flannel",
        devices: &["flannel.*", "flannel-v6.*", "flannel-wg*", "cni0"],
        shared: &[],
        directories: &["/run/flannel"],
    },
    Other {
        name: "Calico",
        devices: &["cali*", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali"],
        shared: &["tunl0"],
        directories: &["/run/calico"],
    },
    Other {
        name: "Weave",
        devices: &["weave", "datapath", "vethwe-*", "vxlan-6784"],
        shared: &[],
        directories: &["/run/weave"],
    },
];

/// Everything that is found now.
pub(super) async fn scan(netlink: &Netlink) -> Vec<ProblemView> {
    let mut problems = Vec::new();
    // half a second at most, and reading large tables of rules: not on the runtime's own threads
    match tokio::task::spawn_blocking(|| (running(), Leftovers::find())).await {
        Ok((mode, found)) => problems.extend(kube_proxy(mode.as_deref(), &found)),
        Err(error) => tracing::warn!(%error, "look for kube-proxy"),
    }
    match netlink.links().await {
        Ok(links) => problems.extend(others(&links, &|directory| directory.is_dir())),
        Err(error) => tracing::debug!(%error, "look for other networks"),
    }
    problems
}

fn kube_proxy(
    mode: Option<&str>,
    found: &Result<Leftovers, super::kube_proxy::LeftoversError>,
) -> Option<ProblemView> {
    let message = match (mode, found) {
        (Some(mode), _) => format!(
            "kube-proxy runs here (mode {mode}), and both of us translate services: delete its DaemonSet, or start the node \
             without it; then `dataplane-agent cleanup --kube-proxy` removes what it leaves"
        ),
        (None, Ok(found)) if !found.is_empty() || found.ipvs => format!(
            "kube-proxy left {} that go on translating services: `dataplane-agent cleanup --kube-proxy` shows what would \
             be removed, with --yes removes it",
            found.summary()
        ),
        (None, Ok(_)) => return None,
        (None, Err(error)) => {
            tracing::debug!(%error, "look for what kube-proxy left");
            return None;
        }
    };
    Some(problem("kube-proxy", message))
}

fn others(links: &[Link], is_directory: &dyn Fn(&Path) -> bool) -> Vec<ProblemView> {
    let mut problems = Vec::new();
    for other in &OTHERS {
        let mut signs: Vec<String> = links
            .iter()
            .filter(|link| {
                other.devices.iter().any(|pattern| matches(pattern, &link.name))
                    || (link.up && other.shared.contains(&link.name.as_str()))
            })
            .map(|link| link.name.clone())
            .collect();
        let devices = signs.len();
        // hundreds of pods need not be named one by one
        if devices > 3 {
            signs.truncate(2);
            signs.push(format!("{} more devices", devices - 2));
        }
        if devices == 0 {
            signs.extend(
                other
                    .directories
                    .iter()
                    .filter(|path| is_directory(Path::new(path)))
                    .map(|path| (*path).to_owned()),
            );
        }
        if !signs.is_empty() {
            let message = format!(
                "{} was or is the pod network here ({}): uninstall it, drain the node and restart it, so that no pod keeps \
                 a device of it",
                other.name,
                signs.join(", ")
            );
            problems.push(problem(other.name, message));
        }
    }
    problems
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(begin) => name.starts_with(begin),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, up: bool) -> Link {
        let mut link = Link::named(name);
        link.up = up;
        link
    }

    #[test]
    fn other_networks_are_known_by_their_devices_or_directories() {
        let links = [
            link("eth0", true),
            link("flannel.1", true),
            link("cni0", false),
            link("cali1234", true),
            link("cali1235", true),
            link("cali1236", true),
            link("cali1237", true),
        ];
        let found = others(&links, &|path| path == Path::new("/run/weave"));
        let said: Vec<_> = found.iter().map(|problem| problem.message.as_str()).collect();
        assert!(
            said[0].starts_with("flannel was or is the pod network here (flannel.1, cni0): uninstall it"),
            "{said:?}"
        );
        assert!(said[1].contains("(cali1234, cali1235, 2 more devices)"), "{said:?}");
        assert!(said[2].contains("Weave") && said[2].contains("/run/weave"), "{said:?}");
    }

    #[test]
    fn a_device_the_kernel_makes_by_itself_means_nothing_while_it_is_down() {
        assert_eq!(others(&[link("tunl0", false)], &|_| false), []);
        assert_eq!(others(&[link("tunl0", true)], &|_| false).len(), 1);
    }

    #[test]
    fn kube_proxy_running_or_gone_is_said_with_what_to_do() {
        let runs = kube_proxy(Some("iptables"), &Ok(Leftovers::default())).unwrap().message;
        assert!(runs.contains("mode iptables") && runs.contains("delete its DaemonSet"), "{runs}");
        let left = Leftovers { ipvs: true, ..Leftovers::default() };
        let left = kube_proxy(None, &Ok(left)).unwrap().message;
        assert!(left.contains("IPVS") && left.contains("cleanup --kube-proxy"), "{left}");
        assert_eq!(kube_proxy(None, &Ok(Leftovers::default())), None);
    }
}
