//! Calls by the CNI specification: versions, error codes, messages.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    RANGES, host_device,
    rig::{Call, Container, Runtime},
};

#[test]
fn result_has_the_format_of_the_requested_version() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Container::create()?;
        let result = runtime.pod_call("ADD", &pod).with("cniVersion", version).ok()?;
        assert_eq!(result["cniVersion"], version);
        let has_family = result["ips"][0].get("version").is_some();
        assert_eq!(has_family, version < "1", "{result}");
        assert_eq!(result["interfaces"][1].get("mtu").is_some(), version == "1.1.0", "{result}");
        assert_eq!(result["interfaces"][1]["sandbox"], pod.netns());
        assert_eq!(
            result["routes"],
            json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}])
        );
        if version > "0.4" {
            let check = runtime.check(&pod, &result).with("cniVersion", version);
            assert_eq!(check.ok()?, Value::Null);
        }
        assert_eq!(runtime.pod_call("DEL", &pod).with("cniVersion", version).ok()?, Value::Null);
    }
    runtime.expect_clean()
}

#[test]
fn version_is_answered_without_an_agent() -> Result<()> {
    let no_agent = std::path::Path::new("/nonexistent/agent.sock");
    for (requested, returned) in [("0.4.0", "0.4.0"), ("1.1.0", "1.1.0"), ("9.0.0", "1.1.0")] {
        let versions = Call::new("VERSION", no_agent, requested).ok()?;
        let expected =
            json!({"cniVersion": returned, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]});
        assert_eq!(versions, expected);
    }
    Ok(())
}

#[test]
fn invalid_call_returns_its_error_code_and_names_the_parameter() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    let add = || runtime.pod_call("ADD", &pod);
    let too_old = |command: &str, version: &str| runtime.pod_call(command, &pod).with("cniVersion", version);
    for (call, code, text) in [
        (too_old("CHECK", "0.3.1"), 1, "CHECK"),
        (too_old("GC", "1.0.0"), 1, "GC"),
        (too_old("STATUS", "1.0.0"), 1, "STATUS"),
        (add().set("CNI_CONTAINERID", ""), 4, "CNI_CONTAINERID"),
        (add().set("CNI_IFNAME", "no/name"), 4, "CNI_IFNAME"),
        (add().set("CNI_NETNS", ""), 4, "CNI_NETNS"),
        (add().set("CNI_NETNS", "/run/netns/nowhere"), 4, "CNI_NETNS: network namespace /run/netns/nowhere"),
        (add().set("CNI_NETNS", runtime.namespace.path().to_string_lossy()), 4, "is the node's own"),
        (add().set("CNI_NETNS", "/proc/version"), 4, "CNI_NETNS: /proc/version is not a network namespace"),
        (add().with("name", json!(null)), 7, "name"),
        (add().with("agentSocket", 7), 7, "agentSocket"),
        (add().with("prevResult", json!({"ips": []})), 7, "prevResult"),
        (runtime.pod_call("CHECK", &pod), 7, "prevResult"),
        (runtime.call("GC"), 7, "cni.dev/valid-attachments"),
    ] {
        let (found, message) = call.error().with_context(|| format!("{call:?}"))?;
        assert_eq!(found, code, "{message}");
        assert!(message.contains(text), "{text} in {message}");
    }
    let (code, message) = add().with("cniVersion", "0.2.0").run()?.error(Some("1.1.0"))?;
    assert_eq!((code, message.contains("0.2.0")), (1, true), "{message}");
    let (code, _) = add().set("CNI_COMMAND", "FROB").run()?.error(None)?;
    assert_eq!(code, 4);
    runtime.expect_clean()
}

#[test]
fn missing_agent_is_a_temporary_error() -> Result<()> {
    let mut runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    let result = runtime.add(&pod)?;
    runtime.kill()?;
    for (call, expected) in [
        (runtime.pod_call("ADD", &pod), 11),
        (runtime.check(&pod, &result), 11),
        (runtime.call("STATUS"), 50),
    ] {
        let (code, message) = call.error()?;
        assert_eq!(code, expected, "{message}");
        assert!(message.starts_with("the agent cannot be reached at "), "{message}");
    }
    runtime.start()?;
    runtime.pod_call("DEL", &pod).ok()?;
    runtime.expect_clean()
}

#[test]
fn node_without_a_pod_cidr_is_not_ready() -> Result<()> {
    let mut runtime = Runtime::new(&[])?;
    let pod = Container::create()?;
    assert_eq!(runtime.call("STATUS").error()?.0, 50);
    let (code, message) = runtime.pod_call("ADD", &pod).error()?;
    assert_eq!((code, message.contains("no pod range yet")), (11, true), "{message}");
    runtime.pod_call("DEL", &pod).ok()?;
    runtime.set_ranges(&RANGES);
    runtime.restart()?;
    assert_eq!(runtime.call("STATUS").ok()?, Value::Null);
    runtime.add(&pod)?;
    Ok(())
}

#[test]
fn changed_pod_network_fails_check_and_add_repairs_it() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    let mut result = runtime.add(&pod)?;
    let device = host_device(&result).to_owned();
    assert_eq!(runtime.check(&pod, &result).ok()?, Value::Null);
    let changes: [(&dyn Fn() -> Result<String>, &str); 7] = [
        (&|| pod.namespace.ip("addr del fd77::1/128 dev eth0"), "eth0 in the pod does not have fd77::1"),
        (&|| pod.namespace.ip("route del default"), "the pod has no IPv4 default route"),
        (&|| pod.namespace.ip("neigh del fe80::1 dev eth0"), "no permanent neighbour fe80::1"),
        (&|| pod.namespace.ip("link set eth0 down"), "eth0 in the pod is down"),
        (&|| runtime.namespace.ip(&format!("link set {device} down")), &format!("device {device} is down")),
        (&|| runtime.namespace.ip("route flush proto 218"), "the node has no route to 10.77.0."),
        (&|| runtime.namespace.ip(&format!("link del {device}")), &format!("device {device} does not exist")),
    ];
    for (change, text) in changes {
        change()?;
        let (code, message) = runtime.check(&pod, &result).error()?;
        assert_eq!(code, 104, "{message}");
        assert!(message.contains(text), "{text} in {message}");
        // each repair allocates new addresses: only the first change may name one
        result = runtime.add(&pod)?;
        assert_eq!(runtime.check(&pod, &result).ok()?, Value::Null);
    }
    runtime.pod_call("DEL", &pod).ok()?;
    runtime.expect_clean()
}

#[test]
fn check_compares_the_previous_result() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let (pod, other) = (Container::create()?, Container::create()?);
    let result = runtime.add(&pod)?;
    let mut wrong = result.clone();
    wrong["ips"][0]["address"] = json!("10.77.0.9/32");
    let (code, message) = runtime.check(&pod, &wrong).error()?;
    assert_eq!(code, 104);
    assert!(
        message.contains("10.77.0.9 is not") && message.contains("10.77.0.1 of this pod is missing"),
        "{message}"
    );
    // never added
    wrong["interfaces"][1]["sandbox"] = json!(other.netns());
    assert_eq!(runtime.check(&other, &wrong).error()?.0, 3);
    // the datapath reports an error
    fs::write(runtime.path("run/fail-check"), "")?;
    let (code, message) = runtime.check(&pod, &result).error()?;
    assert_eq!((code, message.contains("datapath")), (104, true), "{message}");
    Ok(())
}

#[test]
fn add_fails_if_the_container_has_a_device_of_the_name() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    pod.namespace.ip("link add eth0 type veth peer name other")?;
    let (code, message) = runtime.pod_call("ADD", &pod).error()?;
    assert_eq!(code, 101);
    assert!(message.contains("eth0") && message.contains("File exists"), "{message}");
    assert_eq!(pod.ip_json("link show")?.len(), 3, "the container's devices are unchanged");
    runtime.expect_clean()
}
