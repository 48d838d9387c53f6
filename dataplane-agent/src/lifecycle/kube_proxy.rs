//! Finds and removes the rules that kube-proxy left in this network namespace.
//!
//! kubelet and network policy agents have `KUBE-` chains too: only names that kube-proxy uses
//! count. nftables rules (including those of iptables-nft) are removed by handle; iptables-legacy
//! rules with its own tools, if installed.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    process::{Command, Stdio},
    time::Duration,
};

use std::io::{Read as _, Write as _};

use crate::netlink::nftables::{Chain, Family, Jump, Nftables, Removal, Table};

/// Name of kube-proxy's nftables table, one per family.
const TABLE: &str = "kube-proxy";
/// Tables of iptables.
const IPTABLES: [&str; 4] = ["mangle", "nat", "filter", "raw"];
/// Chains of kube-proxy in all of its modes (`pkg/proxy/{iptables,ipvs}/proxier.go`,
/// `CleanupLeftovers`).
const CHAINS: [&str; 16] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-NODE-PORT",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-POSTROUTING",
    "KUBE-FORWARD",
    "KUBE-MARK-MASQ",
    "KUBE-MARK-DROP",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-PORTALS-HOST",
    "KUBE-PORTALS-CONTAINER",
];
/// Prefixes of its chains of services and endpoints, which end in a hash.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];
/// Default metrics address of kube-proxy, which serves `/proxyMode`.
const PROXY_MODE_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);
/// Timeout of a request on loopback.
const TIMEOUT: Duration = Duration::from_millis(500);
/// Tools and table lists of iptables-legacy, by family.
const LEGACY: [(&str, &str, &str); 2] = [
    ("iptables-legacy-save", "iptables-legacy-restore", "/proc/thread-self/net/ip_tables_names"),
    ("ip6tables-legacy-save", "ip6tables-legacy-restore", "/proc/thread-self/net/ip6_tables_names"),
];

/// Rules of kube-proxy that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// kube-proxy's own tables.
    pub tables: Vec<Table>,
    /// Its chains in tables of iptables-nft.
    pub chains: Vec<Chain>,
    /// Rules in other chains that jump to its chains.
    pub jumps: Vec<Jump>,
    /// Its chains and jumps in iptables-legacy.
    pub legacy: Vec<Legacy>,
    /// There are IPVS virtual servers, of kube-proxy or another program.
    pub ipvs: bool,
}

/// kube-proxy's chains and jumps in one table of iptables-legacy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Legacy {
    /// Name of the restore tool.
    restore: &'static str,
    table: String,
    chains: Vec<String>,
    /// Rules that jump to them, in the form of the save tool.
    jumps: Vec<String>,
}

/// Error while rules are read or removed.
#[derive(Debug, thiserror::Error)]
pub enum LeftoversError {
    #[error("cannot read nftables rules: {0}")]
    Read(#[source] io::Error),
    #[error("cannot remove nftables rules: {0}")]
    Remove(#[source] io::Error),
    #[error("{program} failed: {reason}")]
    Tool { program: &'static str, reason: String },
}

impl Leftovers {
    /// Finds rules of kube-proxy.
    pub fn find() -> Result<Self, LeftoversError> {
        let mut found = Self { ipvs: has_ipvs(), legacy: legacy()?, ..Self::default() };
        // fails on a kernel without nftables
        let Ok(mut nftables) = Nftables::open() else { return Ok(found) };
        let tables = match nftables.tables() {
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => return Ok(found),
            tables => tables.map_err(LeftoversError::Read)?,
        };
        let of_ip = |table: &Table| [Family::IPV4, Family::IPV6].contains(&table.family);
        found.tables = tables.iter().filter(|table| of_ip(table) && table.name == TABLE).cloned().collect();
        let is_owned = |chain: &Chain| {
            of_ip(&chain.table)
                && IPTABLES.contains(&chain.table.name.as_str())
                && is_kube_proxy_chain(&chain.name)
        };
        found.chains = nftables.chains().map_err(LeftoversError::Read)?;
        found.chains.retain(is_owned);
        for table in &tables {
            if found.chains.iter().any(|chain| chain.table == *table) {
                let jumps = nftables.jumps(table).map_err(LeftoversError::Read)?;
                found.jumps.extend(
                    jumps.into_iter().filter(|jump| {
                        is_kube_proxy_chain(&jump.to) && !is_kube_proxy_chain(&jump.from.name)
                    }),
                );
            }
        }
        Ok(found)
    }

    /// True if [`Self::remove`] would remove nothing.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.chains.is_empty() && self.legacy.is_empty()
    }

    /// A short description.
    pub fn summary(&self) -> String {
        let chains = self.chains.len() + self.legacy.iter().map(|legacy| legacy.chains.len()).sum::<usize>();
        let mut parts: Vec<String> =
            self.tables.iter().map(|table| format!("nftables table {table}")).collect();
        if chains > 0 {
            parts.push(format!("{chains} iptables chains (KUBE-SERVICES, ..)"));
        }
        if self.ipvs {
            parts.push("IPVS virtual servers".to_owned());
        }
        parts.join(", ")
    }

    /// One line per item, in the order of removal.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> =
            self.tables.iter().map(|table| format!("nftables table {table}")).collect();
        lines.extend(self.jumps.iter().map(|Jump { from, handle, to }| {
            format!("rule in {} {} to {to} (handle {handle})", tool(from.table.family), table_and_chain(from))
        }));
        lines.extend(
            self.chains
                .iter()
                .map(|chain| format!("chain in {} {}", tool(chain.table.family), table_and_chain(chain))),
        );
        for Legacy { restore, table, chains, jumps } in &self.legacy {
            let tool = restore.trim_end_matches("-restore");
            lines.extend(jumps.iter().map(|rule| format!("rule in {tool} {table}: {rule}")));
            lines.extend(chains.iter().map(|chain| format!("chain in {tool} {table} {chain}")));
        }
        lines
    }

    /// Removes the rules; jumps first, so that no packet meets a partly removed chain.
    pub fn remove(&self) -> Result<(), LeftoversError> {
        for legacy in &self.legacy {
            legacy.remove()?;
        }
        let mut removals: Vec<Removal> = self.tables.iter().cloned().map(Removal::Table).collect();
        removals.extend(self.jumps.iter().cloned().map(Removal::Rule));
        removals.extend(self.chains.iter().cloned().map(Removal::Rules));
        removals.extend(self.chains.iter().cloned().map(Removal::Chain));
        if removals.is_empty() {
            return Ok(());
        }
        let mut nftables = Nftables::open().map_err(LeftoversError::Remove)?;
        nftables.remove(&removals).map_err(LeftoversError::Remove)
    }
}

/// Mode of a running kube-proxy, by its `/proxyMode`; `None`: it does not run.
pub fn running_mode() -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&PROXY_MODE_ADDRESS, TIMEOUT).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).ok()?;
    stream.write_all(b"GET /proxyMode HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.take(4_096).read_to_string(&mut answer).ok()?;
    let mode = answer.split_once("\r\n\r\n")?.1.trim();
    ["iptables", "ipvs", "nftables", "userspace"].contains(&mode).then(|| mode.to_owned())
}

fn is_kube_proxy_chain(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

fn has_ipvs() -> bool {
    // the first three lines are headings
    fs::read_to_string("/proc/thread-self/net/ip_vs").is_ok_and(|text| text.lines().count() > 3)
}

fn tool(family: Family) -> &'static str {
    if family == Family::IPV4 { "iptables" } else { "ip6tables" }
}

fn table_and_chain(chain: &Chain) -> String {
    format!("{} {}", chain.table.name, chain.name)
}

/// Rules in iptables-legacy; empty if its tools are not installed.
fn legacy() -> Result<Vec<Legacy>, LeftoversError> {
    let mut found = Vec::new();
    for (save, restore, names) in LEGACY {
        // only tables in use: the tool would load the module of any other table
        let tables = fs::read_to_string(names).unwrap_or_default();
        for table in tables.lines() {
            let output = match Command::new(save).args(["-t", table]).stdin(Stdio::null()).output() {
                Ok(output) => output,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(LeftoversError::Tool { program: save, reason: error.to_string() }),
            };
            if !output.status.success() {
                let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(LeftoversError::Tool { program: save, reason });
            }
            found.extend(Legacy::read(restore, table, &String::from_utf8_lossy(&output.stdout)));
        }
    }
    Ok(found)
}

impl Legacy {
    /// Parses the output of the save tool; `None`: no chains of kube-proxy.
    fn read(restore: &'static str, table: &str, saved: &str) -> Option<Self> {
        let names = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
        let chains: Vec<_> = names.filter(|name| is_kube_proxy_chain(name)).map(str::to_owned).collect();
        let jumps = saved.lines().filter(|line| {
            let mut words = line.split(' ');
            let from = words.by_ref().skip_while(|word| *word != "-A").nth(1);
            let to = words.skip_while(|word| !["-j", "-g"].contains(word)).nth(1);
            from.is_some_and(|from| !is_kube_proxy_chain(from)) && to.is_some_and(is_kube_proxy_chain)
        });
        let jumps = jumps.map(str::to_owned).collect();
        (!chains.is_empty()).then(|| Self { restore, table: table.to_owned(), chains, jumps })
    }

    /// Input of the restore tool: deletes the jumps, then flushes and deletes the chains.
    fn script(&self) -> String {
        let mut script = format!("*{}\n", self.table);
        for rule in &self.jumps {
            script.push_str(&format!("{}\n", rule.replacen("-A ", "-D ", 1)));
        }
        for operation in ["-F", "-X"] {
            for chain in &self.chains {
                script.push_str(&format!("{operation} {chain}\n"));
            }
        }
        script.push_str("COMMIT\n");
        script
    }

    fn remove(&self) -> Result<(), LeftoversError> {
        let failed = |reason: String| LeftoversError::Tool { program: self.restore, reason };
        let mut command = Command::new(self.restore);
        command.args(["--noflush", "--wait", "5"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.script().as_bytes()).map_err(|error| failed(error.to_string()))?;
        }
        let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_kubelet_and_policy_agents_are_not_kube_proxys() {
        for name in
            ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-ROUTER-INPUT", "DOCKER"]
        {
            assert!(!is_kube_proxy_chain(name), "{name}");
        }
        for name in ["KUBE-SERVICES", "KUBE-SVC-ERIFXISQEP7F7OF4", "KUBE-SEP-X", "KUBE-PROXY-CANARY"] {
            assert!(is_kube_proxy_chain(name), "{name}");
        }
    }

    #[test]
    fn legacy_script_removes_only_kube_proxys_chains_and_jumps() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n:DOCKER - [0:0]\n\
            -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
            -A PREROUTING -j DOCKER\n-A KUBE-SERVICES -j KUBE-SVC-A\n-A DOCKER -j RETURN\nCOMMIT\n";
        let found = Legacy::read("iptables-legacy-restore", "nat", saved).unwrap();
        assert_eq!(
            found.script(),
            "*nat\n-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -F KUBE-SERVICES\n-F KUBE-SVC-A\n-X KUBE-SERVICES\n-X KUBE-SVC-A\nCOMMIT\n"
        );
        assert_eq!(
            Legacy::read(
                "iptables-legacy-restore",
                "nat",
                "*nat\n:DOCKER - [0:0]\n-A PREROUTING -j DOCKER\n"
            ),
            None
        );
    }
}
