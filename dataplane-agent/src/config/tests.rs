//! Keys from every place, and invalid values.

use std::{collections::BTreeSet, path::Path};

use clap::{CommandFactory, Parser};

use super::*;
use crate::state::{Forwarding, LoadBalancing};

/// `run` as in the binary.
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
}

fn args(args: &[&str]) -> RunArgs {
    Cli::try_parse_from([&["run"], args].concat()).unwrap().run
}

fn with_file(yaml: &str, flags: &[&str]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.yaml");
    std::fs::write(&path, yaml).unwrap();
    let flags = [flags, &["--config", path.to_str().unwrap()]].concat();
    Config::load(&args(&flags)).map_err(|error| error.to_string().replace(dir.path().to_str().unwrap(), ""))
}

fn refusal(yaml: &str) -> String {
    with_file(yaml, &[]).unwrap_err()
}

const EVERYTHING: &str = "
node_name: n1.example
source: kubernetes
manifests: /m
api_server: ['https://10.0.0.1:6443', 'https://[fd00::2]:6443/k8s']
kubeconfig: /k
state_dir: /s
run_dir: /r
bpffs: /b
cgroup: /c
uplinks: [eth0, eth1]
routing: vxlan
vxlan: {vni: 7, port: 4789, device: overlay0}
mtu: 9000
mark: 0x300000
egress: stack
masquerade: {enabled: false, except: [10.0.0.0/8, 'fd00::/8'], ports: 50000-50999}
connect_time: {tcp: false, udp: true}
services: {load_balancing: maglev, forwarding: dsr, ping: false}
xdp: native
node_ports: {addresses: [10.0.0.0/8], loopback: false}
allowed_sources_namespaces: [vpn, virtual-machines]
capacity:
  endpoints: 1
  routes: 2
  services: 3
  backends: 4
  backend_generations: 5
  flows: 6
  fragments: 7
  datagram_origins: 8
  source_ranges: 8
  affinity: 8
  events_bytes: 4096
http_bind_address: off
log: debug
log_format: json
log_ebpf: trace
";

#[test]
fn every_key_of_the_file_reaches_the_configuration() {
    let config = with_file(EVERYTHING, &[]).unwrap();
    assert_eq!(config.node_name, "n1.example");
    assert_eq!(config.manifests, Path::new("/m"));
    assert_eq!(config.source, Source::Kubernetes);
    let servers = ["https://10.0.0.1:6443/", "https://[fd00::2]:6443/k8s"];
    assert_eq!(config.api_server.iter().map(ToString::to_string).collect::<Vec<_>>(), servers);
    assert_eq!(config.kubeconfig.as_deref(), Some(Path::new("/k")));
    assert_eq!(config.state_dir, Path::new("/s"));
    assert_eq!(config.run_dir, Path::new("/r"));
    assert_eq!(config.bpffs, Path::new("/b"));
    assert_eq!(config.cgroup.as_deref(), Some(Path::new("/c")));
    assert_eq!(config.uplinks, "eth0,eth1".parse().unwrap());
    assert_eq!(config.routing, Routing::Vxlan);
    assert_eq!(config.vxlan, Vxlan { vni: 7, port: 4789, device: "overlay0".to_owned() });
    assert_eq!((config.mtu, config.mark), (Some(9000), 0x30_0000));
    assert_eq!(config.egress, Egress::Stack);
    let except = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
    assert_eq!(config.masquerade, Masquerade { enabled: false, except, ports: 50_000..=50_999 });
    assert_eq!(config.connect_time, ConnectTime { tcp: false, udp: true });
    let addresses = NodePortAddresses::Within(vec!["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(config.node_ports, NodePorts { addresses, loopback: false });
    assert_eq!(config.allowed_sources_namespaces, ["vpn", "virtual-machines"]);
    let services =
        Services { load_balancing: LoadBalancing::Maglev, forwarding: Forwarding::Dsr, ping: false };
    assert_eq!((config.services, config.xdp), (services, XdpUse::Native));
    let capacity = Capacity {
        endpoints: 1,
        routes: 2,
        services: 3,
        backends: 4,
        backend_generations: 5,
        flows: 6,
        fragments: 7,
        datagram_origins: 8,
        source_ranges: 8,
        affinity: 8,
        events_bytes: 4096,
    };
    assert_eq!(config.capacity, capacity);
    assert_eq!(config.http_bind_address, None);
    assert_eq!(config.log, "debug");
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.log_ebpf, EbpfLog::Trace);
}

#[test]
fn an_empty_file_means_the_defaults() {
    for yaml in ["", "# nothing\n", "vxlan:\n  # vni: 2\n", "{}"] {
        let config = with_file(yaml, &["--node-name", "n1"]).unwrap();
        assert_eq!(config.manifests, Path::new("/etc/dataplane/manifests"), "{yaml:?}");
        assert_eq!(config.vxlan, Vxlan { vni: 1, port: 8472, device: "dataplane0".to_owned() });
        assert_eq!((config.masquerade.ports, config.mark), (10_000..=29_999, 0x1000));
        assert!(config.masquerade.enabled && config.connect_time.tcp && !config.connect_time.udp);
        assert_eq!(config.http_bind_address, Some("127.0.0.1:9964".parse().unwrap()));
        assert_eq!((config.source, config.api_server, config.kubeconfig), (Source::Manifests, vec![], None));
        assert_eq!((config.mtu, config.cgroup, config.uplinks), (None, None, DevicePatterns::default()));
        assert_eq!(config.capacity, Capacity::of_node());
    }
}

#[test]
fn flags_override_the_file() {
    let flags = [
        "--mtu=auto",
        "--mark=0x10000",
        "--vxlan-vni=9",
        "--masquerade-except=",
        "--http-bind-address=[::1]:80",
        "--uplinks=a,b",
    ];
    let config = with_file(EVERYTHING, &flags).unwrap();
    assert_eq!((config.mtu, config.mark), (None, 0x10000));
    assert_eq!(config.vxlan.vni, 9);
    assert_eq!(config.masquerade.except, []);
    assert_eq!(config.http_bind_address, Some("[::1]:80".parse().unwrap()));
    assert_eq!(config.uplinks, "a,b".parse().unwrap());
    assert_eq!(config.routing, Routing::Vxlan);
}

#[test]
fn each_key_has_a_flag_and_a_variable_named_after_it() {
    let command = Cli::command();
    let flags: BTreeSet<_> = command
        .get_arguments()
        .filter(|arg| !matches!(arg.get_id().as_str(), "help" | "config"))
        .map(|arg| {
            let flag = arg.get_long().unwrap().to_owned();
            (flag, arg.get_env().unwrap().to_str().unwrap().to_owned())
        })
        .collect();
    let expected = KEYS.map(|key| {
        let flag = key.replace(['_', '.'], "-");
        let variable = format!("DATAPLANE_{}", key.replace('.', "_").to_uppercase());
        (flag, variable)
    });
    assert_eq!(flags, BTreeSet::from(expected));
    for key in KEYS {
        let known = Settings::default().fill(key, "");
        assert_ne!(known, Err(keys::FillError::Unknown), "{key}");
    }
}

#[test]
fn variables_override_the_file_and_flags_override_variables() {
    // a process of its own: variables belong to the process, and other tests run in this one
    if std::env::var_os("DATAPLANE_VXLAN_PORT").is_some() {
        let config = with_file(EVERYTHING, &["--vxlan-vni=9"]).unwrap();
        assert_eq!(config.vxlan, Vxlan { vni: 9, port: 6000, device: "overlay0".to_owned() });
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "config::tests::variables_override_the_file_and_flags_override_variables"])
        .envs([("DATAPLANE_VXLAN_PORT", "6000"), ("DATAPLANE_VXLAN_VNI", "8")])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn unknown_key_is_refused_with_a_suggestion() {
    let cases = [
        ("routng: vxlan", "/config.yaml: unknown key routng: did you mean routing?"),
        ("node-name: n1", "/config.yaml: unknown key node-name: did you mean node_name?"),
        ("vxlan: {vnii: 1}", "/config.yaml: unknown key vxlan.vnii: did you mean vxlan.vni?"),
        ("vni: 1", "/config.yaml: unknown key vni: did you mean vxlan.vni?"),
        ("vxlann: {port: 1}", "/config.yaml: unknown key vxlann.port: did you mean vxlan.port?"),
        (
            "vxlan: 5",
            "/config.yaml: unknown key vxlan: it is a section with the keys vxlan.vni, vxlan.port, vxlan.device",
        ),
        (
            "vxlan: {zzzzzzzzzzzzz: 5}",
            "/config.yaml: unknown key vxlan.zzzzzzzzzzzzz: section vxlan has the keys vxlan.vni, vxlan.port, vxlan.device",
        ),
    ];
    for (yaml, message) in cases {
        assert_eq!(refusal(yaml), message, "{yaml}");
    }
    assert!(refusal("zzzzzzzzzzz: 1").contains("known keys are node_name, source,"));
}

#[test]
fn invalid_value_is_refused_with_the_allowed_ones() {
    let cases = [
        ("mtu: 1000", "mtu: \"1000\": must be auto or 1280 to 65535"),
        ("mark: 0", "mark: \"0\": must be the bits of a packet mark, such as 0x1000, and not 0"),
        ("mark: '0xg'", "mark: \"0xg\": must be the bits of a packet mark"),
        ("mark: 0x100000000", "mark: \"4294967296\": must be the bits of a packet mark"),
        ("vxlan: {vni: 16777216}", "vxlan.vni: \"16777216\": must be 1 to 16777215"),
        ("vxlan: {port: 0}", "vxlan.port: \"0\": must be 1 to 65535"),
        ("xdp: generic", "xdp: \"generic\": must be off or native"),
        ("services: {forwarding: nat}", "services.forwarding: \"nat\": must be snat or dsr"),
        ("services: {load_balancing: best}", "services.load_balancing: \"best\": must be random or maglev"),
        ("routing: ospf", "routing: \"ospf\": must be auto, native or vxlan"),
        ("masquerade: {ports: 2000-1999}", "masquerade.ports: \"2000-1999\": must be FIRST-LAST within 1024"),
        ("masquerade: {ports: 80-90}", "masquerade.ports: \"80-90\": must be FIRST-LAST within 1024"),
        ("masquerade: {except: [10.0.0.1/8]}", "10.0.0.1/8 has host bits set; did you mean 10.0.0.0/8?"),
        (
            "masquerade: {except: ['::ffff:10.0.0.0/104']}",
            "::ffff:10.0.0.0/104 is IPv4-mapped; did you mean 10.0.0.0/8?",
        ),
        ("masquerade: {except: [ten]}", "\"ten\" is not a CIDR"),
        ("allowed_sources_namespaces: ['vpn-*']", "\"vpn-*\" is not the name of a namespace"),
        ("allowed_sources_namespaces: [Vpn]", "\"Vpn\" is not the name of a namespace"),
        ("masquerade: {enabled: maybe}", "masquerade.enabled: \"maybe\": must be true or false"),
        ("node_name: Node_1", "node_name: \"Node_1\": must be the name of a Node"),
        ("node_name: ''", "node_name: \"\": must be the name of a Node"),
        ("source: etcd", "source: \"etcd\": must be manifests or kubernetes"),
        ("kubeconfig: ''", "kubeconfig: \"\": must be a path"),
        ("api_server: 10.0.0.1", "api_server: \"10.0.0.1\": \"10.0.0.1\" is not a server URL"),
        ("api_server: ['ftp://a']", "\"ftp://a\" is not a server URL such as https://10.0.0.1:6443"),
        ("api_server: ['https://u@a']", "\"https://u@a\" is not a server URL"),
        ("api_server: ['https://a:0']", "\"https://a:0\" is not a server URL"),
        ("api_server: ['https://a?b']", "\"https://a?b\" is not a server URL"),
        ("api_server: ['https://a', 'https://a/']", "https://a/ is listed twice"),
        ("uplinks: []", "uplinks: \"\": must be auto, or names of network devices"),
        ("uplinks: [a-name-that-is-too-long]", "must be auto, or names of network devices"),
        ("capacity: {flows: 0}", "capacity.flows: \"0\": must be 1 to 16777216"),
        ("capacity: {events_bytes: 5000}", "capacity.events_bytes: \"5000\": must be a power of two"),
        ("http_bind_address: localhost", "http_bind_address: \"localhost\": must be off, or ADDRESS:PORT"),
        ("log: 'a=loud'", "log: \"a=loud\": must be a filter"),
        ("log_format: xml", "log_format: \"xml\": unknown log format \"xml\": must be text or json"),
        ("log_ebpf: loud", "log_ebpf: \"loud\": log level \"loud\" is not one of"),
        ("state_dir: ''", "state_dir: \"\": must be a path"),
        ("mtu:", "mtu: has no value"),
        ("uplinks: [{a: b}]", "uplinks: must be a list of plain values"),
        ("uplinks:\n- !docker0", "must be a list of plain values; quote those that begin with ! or *"),
        ("- mtu", "expected a mapping of keys to values, found a list"),
    ];
    for (yaml, message) in cases {
        let refusal = refusal(yaml);
        assert!(refusal.starts_with("/config.yaml: ") && refusal.contains(message), "{yaml}: {refusal}");
    }
}

#[test]
fn a_value_of_the_file_is_checked_even_when_a_flag_overrides_it() {
    let refusal = with_file("mtu: 12", &["--mtu=1500"]).unwrap_err();
    assert!(refusal.contains("mtu: \"12\""), "{refusal}");
}

#[test]
fn a_flag_is_refused_by_its_name() {
    let error = Cli::try_parse_from(["run", "--mtu", "12"]).unwrap_err().to_string();
    assert!(error.contains("--mtu") && error.contains("must be auto or 1280 to 65535"), "{error}");
}

#[test]
fn values_that_collide_are_refused() {
    let port = refusal("{node_name: n1, vxlan: {port: 20001}}");
    assert!(port.starts_with("masquerade.ports: 10000-29999 contains vxlan.port 20001"), "{port}");
    let uplink = refusal("{node_name: n1, uplinks: [dataplane0]}");
    assert_eq!(uplink, "uplinks: dataplane0 is the overlay device (vxlan.device)");
    assert!(with_file("{node_name: n1, vxlan: {port: 20001}, masquerade: {enabled: false}}", &[]).is_ok());
}

#[test]
fn unreadable_file_is_refused_and_named() {
    let missing = Config::load(&args(&["--config", "/nowhere/config.yaml"])).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read configuration /nowhere/config.yaml: "), "{missing}");
    assert!(refusal("mtu: [").starts_with("/config.yaml: "));
    assert!(refusal("mtu: 1500\nmtu: 1500").contains("duplicate"));
}

#[test]
fn node_name_defaults_to_the_host_name() {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_lowercase();
    assert_eq!(Config::load(&args(&[])).unwrap().node_name, host);
}

#[test]
fn docs_list_the_capacities_by_memory() {
    let text = include_str!("../../../docs/config.md");
    for (limit, memory) in
        [("1.5 GiB", 1), ("3 GiB", 2), ("6 GiB", 4), ("48 GiB", 8), ("96 GiB", 64), ("more", 128)]
    {
        let Capacity {
            flows,
            services,
            backends,
            backend_generations,
            datagram_origins,
            affinity,
            fragments,
            ..
        } = Capacity::for_memory(memory << 30);
        assert_eq!((backends, datagram_origins), (backend_generations, affinity));
        let row =
            format!("| {limit} | {flows} | {services} | {backends} | {datagram_origins} | {fragments} | ");
        assert!(text.contains(&row), "{row}");
    }
}

#[test]
fn docs_list_every_key_with_its_default() {
    let text = include_str!("../../../docs/config.md");
    let example = text.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let documented = with_file(example, &["--node-name=n1"]).unwrap();
    let default = with_file("node_name: n1", &[]).unwrap();
    let capacity = Capacity::for_memory(8 << 30);
    let default = Config { file_values: documented.file_values.clone(), capacity, ..default };
    assert_eq!(format!("{documented:?}"), format!("{default:?}"));
    let mut settings = Settings::default();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), example.replace("#node_name", "node_name")).unwrap();
    file::fill(&mut settings, file.path()).unwrap();
    let missing = format!("{settings:?}").split(": None").count() - 1;
    // (mtu and cgroup are `Some(auto)`)
    assert_eq!(missing, 0, "{settings:?}");
}
