//! Removal of kube-proxy's rules, and problems about other pod networks, against the kernel. Needs
//! root.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_agent::{api::views::Status, lifecycle::Lifecycle, netlink::Netlink};
use dataplane_bench::{
    rules::{iptables, nftables},
    services::ServiceSet,
};
use dataplane_testkit::{bins, lab::Namespace, only_as_root};
use tokio::sync::watch;

use super::{NODE, TIMEOUT};

/// A network namespace with firewall rules, deleted on drop.
struct Rules(Namespace);

impl Rules {
    fn new(name: &str) -> Result<Self> {
        let name = format!("dplife-{name}-{}", std::process::id());
        Ok(Self(Namespace::create(&name)?))
    }

    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        self.0.enter(|| {
            let mut command = Command::new(program);
            command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().with_context(|| format!("run {program}"))?;
            child.stdin.take().context("no stdin")?.write_all(input.as_bytes())?;
            let output = child.wait_with_output()?;
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            if !output.status.success() {
                bail!("{program} {}: {stderr}", arguments.join(" "));
            }
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })?
    }

    /// Adds rules that are not kube-proxy's, though some look alike.
    fn add_foreign(&self, backend: &str) -> Result<()> {
        let rules = "*filter\n:DOCKER - [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-ROUTER-INPUT - [0:0]\n\
            -A INPUT -m comment --comment \"kube-router netpol\" -j KUBE-ROUTER-INPUT\n\
            -A FORWARD -s 192.0.2.0/24 -m comment --comment \"see KUBE-SERVICES\" -j DROP\n\
            -A FORWARD -j DOCKER\n-A OUTPUT -j KUBE-FIREWALL\n\
            -A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP\n-A DOCKER -p tcp --dport 80 -j ACCEPT\nCOMMIT\n\
            *nat\n:DOCKER - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
            -A POSTROUTING -s 172.17.0.0/16 ! -o lo -j MASQUERADE\nCOMMIT\n";
        self.run(&format!("iptables-{backend}-restore"), &["--noflush"], rules)?;
        let own = "table inet mine {\n chain kube-proxy {\n type filter hook input priority 5;\n tcp dport 22 accept\n }\n}\n\
            table ip other {\n map kube-proxy { type ipv4_addr : verdict; }\n chain KUBE-SERVICES {\n drop\n }\n}\n";
        self.run("nft", &["-f", "-"], own)?;
        Ok(())
    }

    /// All rules, without counters.
    fn show(&self) -> Result<String> {
        let mut all = self.run("nft", &["--stateless", "list", "ruleset"], "")?;
        all.push_str(&self.run("iptables-legacy-save", &[], "")?);
        let lines = all.lines().filter(|line| !line.starts_with('#'));
        Ok(lines.map(|line| line.split(" [").next().unwrap_or(line)).collect::<Vec<_>>().join("\n"))
    }

    fn cleanup(&self, arguments: &[&str]) -> Result<String> {
        let agent = bins::agent()?;
        let program = agent.to_str().context("not UTF-8")?;
        self.run(program, &[&["cleanup", "--kube-proxy"], arguments].concat(), "")
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        if let Err(error) = Namespace::delete(self.0.name()) {
            eprintln!("{error:#}");
        }
    }
}

/// The base chains of iptables.
const EMPTY: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n\
    *nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n";

#[test]
fn kube_proxys_rules_are_removed_and_foreign_rules_stay() -> Result<()> {
    only_as_root!();
    let services = ServiceSet::new(1_500, "10.180.0.1:80".parse()?);
    for backend in [iptables::Backend::Nft, iptables::Backend::Legacy] {
        let name = if backend == iptables::Backend::Nft { "nft" } else { "legacy" };
        let (clean, used) = (Rules::new(&format!("{name}-a"))?, Rules::new(&format!("{name}-b"))?);
        clean.run(backend.restore(), &[], EMPTY)?;
        clean.add_foreign(name)?;
        iptables::apply(&used.0, &services, backend)?;
        nftables::apply(&used.0, &services, "192.0.2.1".parse()?)?;
        used.add_foreign(name)?;

        let before = used.show()?;
        ensure!(before.contains("KUBE-SVC-") && before.contains("table ip kube-proxy"), "{before}");
        let output = used.cleanup(&[])?;
        ensure!(output.contains("would remove nftables table ip kube-proxy"), "{output}");
        ensure!(
            output.lines().any(|line| line.contains("rule in iptables") && line.contains("KUBE-SERVICES")),
            "{output}"
        );
        ensure!(used.show()? == before, "a dry run changed the rules");
        let output = used.cleanup(&["--yes"])?;
        ensure!(output.lines().last().is_some_and(|line| line.starts_with("removed ")), "{output}");
        let (after, expected) = (used.show()?, clean.show()?);
        ensure!(after == expected, "{name}: remaining rules\n{after}\nexpected\n{expected}");
        let output = used.cleanup(&["--yes"])?;
        ensure!(output.trim() == "nothing to remove: kube-proxy left no rules", "{output}");
    }
    Ok(())
}

#[test]
fn other_pod_networks_and_kube_proxys_rules_are_problems_with_a_remedy() -> Result<()> {
    only_as_root!();
    let used = Rules::new("others")?;
    used.0.ip("link add flannel.1 type veth peer name cali12345")?;
    let services = ServiceSet::new(3, "10.180.0.1:80".parse()?);
    nftables::apply(&used.0, &services, "192.0.2.1".parse()?)?;
    let messages = used.0.enter(|| -> Result<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (_status, seen) = watch::channel(Status::starting(NODE));
        runtime.block_on(async {
            let mut problems = Lifecycle::new(NODE, Netlink::connect()?).start(&seen);
            tokio::time::timeout(TIMEOUT, problems.changed()).await?;
            let messages =
                problems.now().into_iter().map(|problem| format!("{}: {}", problem.subject, problem.message));
            Ok(messages.collect::<Vec<_>>().join("\n"))
        })
    })??;
    ensure!(
        messages.contains(
            "kube-proxy: kube-proxy left rules that still translate Services (nftables table ip kube-proxy"
        ),
        "{messages}"
    );
    ensure!(messages.contains("cleanup --kube-proxy"), "{messages}");
    ensure!(
        messages.contains("flannel: flannel is or was the pod network of this node (flannel.1)"),
        "{messages}"
    );
    ensure!(
        messages.contains("Calico: Calico is or was the pod network of this node (cali12345)"),
        "{messages}"
    );
    Ok(())
}
