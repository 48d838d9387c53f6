//! Detects leftovers of kube-proxy, flannel, Calico and Weave on the node.
//!
//! Looks for devices, rules and directories, because processes may run in other PID namespaces.
//! Removes nothing: `cleanup --kube-proxy` removes kube-proxy's rules; other networks are
//! uninstalled with their own tools.

use std::path::Path;

use super::{
    kube_proxy::{Leftovers, running_mode},
    problems::problem,
};
use crate::{
    api::views::ProblemView,
    netlink::{Link, Netlink},
};

/// Another pod network.
struct OtherNetwork {
    name: &'static str,
    /// Names of its devices; `*` at the end matches any suffix.
    devices: &'static [&'static str],
    /// Devices that the kernel creates too: they count only while they are up.
    shared: &'static [&'static str],
    directories: &'static [&'static str],
}

const OTHER_NETWORKS: [OtherNetwork; 3] = [
    OtherNetwork {
        name: "flannel",
        devices: &["flannel.*", "flannel-v6.*", "flannel-wg*", "cni0"],
        shared: &[],
        directories: &["/run/flannel"],
    },
    OtherNetwork {
        name: "Calico",
        devices: &["cali*", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali"],
        shared: &["tunl0"],
        directories: &["/run/calico"],
    },
    OtherNetwork {
        name: "Weave",
        devices: &["weave", "datapath", "vethwe-*", "vxlan-6784"],
        shared: &[],
        directories: &["/run/weave"],
    },
];

/// Finds all leftovers.
pub(super) async fn scan(netlink: &Netlink) -> Vec<ProblemView> {
    let mut problems = Vec::new();
    // blocking: may wait for half a second and read large rule tables
    match tokio::task::spawn_blocking(|| (running_mode(), Leftovers::find())).await {
        Ok((mode, found)) => problems.extend(kube_proxy(mode.as_deref(), &found)),
        Err(error) => tracing::warn!(%error, "cannot check for kube-proxy"),
    }
    match netlink.links().await {
        Ok(links) => problems.extend(other_networks(&links, &|directory| directory.is_dir())),
        Err(error) => tracing::debug!(%error, "cannot check for devices of other networks"),
    }
    problems
}

fn kube_proxy(
    mode: Option<&str>,
    found: &Result<Leftovers, super::kube_proxy::LeftoversError>,
) -> Option<ProblemView> {
    let message = match (mode, found) {
        (Some(mode), _) => format!(
            "kube-proxy is running on this node (mode {mode}) and translates Services, too: delete its \
             DaemonSet or disable it, then run `dataplane-agent cleanup --kube-proxy` to see the rules it left"
        ),
        (None, Ok(found)) if !found.is_empty() || found.ipvs => format!(
            "kube-proxy left rules that still translate Services ({}): `dataplane-agent cleanup --kube-proxy` \
             lists them; with --yes it removes them",
            found.summary()
        ),
        (None, Ok(_)) => return None,
        (None, Err(error)) => {
            tracing::debug!(%error, "cannot check for rules left by kube-proxy");
            return None;
        }
    };
    Some(problem("kube-proxy", message))
}

fn other_networks(links: &[Link], is_directory: &dyn Fn(&Path) -> bool) -> Vec<ProblemView> {
    let mut problems = Vec::new();
    for other in &OTHER_NETWORKS {
        let mut found: Vec<String> = links
            .iter()
            .filter(|link| {
                other.devices.iter().any(|pattern| matches(pattern, &link.name))
                    || (link.up && other.shared.contains(&link.name.as_str()))
            })
            .map(|link| link.name.clone())
            .collect();
        let devices = found.len();
        // there may be hundreds of pod devices
        if devices > 3 {
            found.truncate(2);
            found.push(format!("{} more devices", devices - 2));
        }
        if devices == 0 {
            found.extend(
                other
                    .directories
                    .iter()
                    .filter(|path| is_directory(Path::new(path)))
                    .map(|path| (*path).to_owned()),
            );
        }
        if !found.is_empty() {
            let message = format!(
                "{} is or was the pod network of this node ({}): uninstall it, then drain and reboot the node, \
                 so that no pod keeps a device of it",
                other.name,
                found.join(", ")
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
    fn other_networks_are_found_by_devices_or_directories() {
        let links = [
            link("eth0", true),
            link("flannel.1", true),
            link("cni0", false),
            link("cali1234", true),
            link("cali1235", true),
            link("cali1236", true),
            link("cali1237", true),
        ];
        let found = other_networks(&links, &|path| path == Path::new("/run/weave"));
        let messages: Vec<_> = found.iter().map(|problem| problem.message.as_str()).collect();
        assert!(
            messages[0].starts_with(
                "flannel is or was the pod network of this node (flannel.1, cni0): uninstall it"
            ),
            "{messages:?}"
        );
        assert!(messages[1].contains("(cali1234, cali1235, 2 more devices)"), "{messages:?}");
        assert!(messages[2].contains("Weave") && messages[2].contains("/run/weave"), "{messages:?}");
    }

    #[test]
    fn device_that_the_kernel_creates_counts_only_while_it_is_up() {
        assert_eq!(other_networks(&[link("tunl0", false)], &|_| false), []);
        assert_eq!(other_networks(&[link("tunl0", true)], &|_| false).len(), 1);
    }

    #[test]
    fn problem_of_kube_proxy_names_the_next_step() {
        let runs = kube_proxy(Some("iptables"), &Ok(Leftovers::default())).unwrap().message;
        assert!(runs.contains("mode iptables") && runs.contains("delete its DaemonSet"), "{runs}");
        let found = Leftovers { ipvs: true, ..Leftovers::default() };
        let message = kube_proxy(None, &Ok(found)).unwrap().message;
        assert!(message.contains("IPVS") && message.contains("cleanup --kube-proxy"), "{message}");
        assert_eq!(kube_proxy(None, &Ok(Leftovers::default())), None);
    }
}
