//! The plugin and the agent's CNI server, called as a container runtime does: environment, stdin,
//! exit code, stdout; real namespaces, real devices. Tests what the CNI specification requires, and
//! that no resource is left over.

mod calls;
mod leftovers;
mod rig;

use std::{collections::BTreeSet, process::Command, thread};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use self::rig::{Container, NODE_V4, NODE_V6, Runtime};

const RANGES: [&str; 2] = ["10.77.0.0/24", "fd77::/64"];

/// Addresses of a result, without the prefix length.
fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().map_or(&[][..], Vec::as_slice);
    let texts = ips.iter().filter_map(|ip| ip["address"].as_str()?.split_once('/'));
    texts.map(|(address, _)| address.to_owned()).collect()
}

fn host_device(result: &Value) -> &str {
    result["interfaces"][0]["name"].as_str().unwrap_or_default()
}

/// A value of every row.
fn column(rows: &[Value], key: &str) -> Vec<String> {
    rows.iter().map(|row| row[key].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn add_connects_a_pod_and_del_removes_everything() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    let result = runtime.add(&pod)?;
    assert_eq!(addresses(&result), ["10.77.0.1", "fd77::1"]);
    let device = host_device(&result).to_owned();

    // in the pod
    let link = pod.ip_json("-d link show eth0")?.remove(0);
    assert_eq!((&link["mtu"], &link["address"]), (&json!(1450), &result["interfaces"][1]["mac"]));
    let found = pod.ip_json("addr show dev eth0")?.remove(0);
    let found = found["addr_info"].as_array().context("no addresses")?.clone();
    assert_eq!(column(&found, "local"), ["10.77.0.1", "fd77::1"], "the pod has no link-local address");
    assert_eq!((&found[0]["prefixlen"], &found[1]["prefixlen"]), (&json!(32), &json!(128)));
    assert!(found.iter().all(|address| address.get("tentative").is_none()), "{found:?}");
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        let routes = pod.ip_json(&format!("{family} route show"))?;
        assert!(
            routes.iter().any(|route| route["dst"] == "default" && route["gateway"] == gateway),
            "{routes:?}"
        );
        let neighbours = pod.ip_json(&format!("{family} neigh show dev eth0"))?;
        let expected = (&json!(gateway), &json!("0e:da:7a:00:00:01"), &json!(["PERMANENT"]));
        let neighbour = &neighbours[0];
        assert_eq!((&neighbour["dst"], &neighbour["lladdr"], &neighbour["state"]), expected);
    }

    // on the node
    let link = runtime.ip_json(&format!("link show {device}"))?.remove(0);
    assert_eq!((&link["mtu"], &link["address"]), (&json!(1450), &json!("0e:da:7a:00:00:01")));
    for (family, address) in [("-4", "10.77.0.1"), ("-6", "fd77::1")] {
        let routes = runtime.ip_json(&format!("{family} route show proto 218"))?;
        assert_eq!(
            (column(&routes, "dst"), column(&routes, "dev")),
            (vec![address.into()], vec![device.clone()])
        );
    }
    let attached =
        format!("attach {device} {} {}", link["ifindex"], result["interfaces"][1]["mac"].as_str().unwrap());
    assert_eq!(runtime.datapath_calls()?, [format!("{attached} 10.77.0.1,fd77::1 test/{}", pod.id)]);

    // connectivity through the kernel, without the datapath
    for (from, to) in [
        (&pod.namespace, NODE_V4),
        (&pod.namespace, NODE_V6),
        (&runtime.namespace, "10.77.0.1"),
        (&runtime.namespace, "fd77::1"),
    ] {
        let ping =
            Command::new("ip").args(["netns", "exec", from.name(), "ping", "-c1", "-W2", to]).output()?;
        assert!(ping.status.success(), "{to}: {}", String::from_utf8_lossy(&ping.stdout));
    }

    assert_eq!(runtime.pod_call("DEL", &pod).ok()?, Value::Null);
    assert_eq!(pod.ip_json("link show")?.len(), 1, "only lo is left");
    assert_eq!(
        runtime.datapath_calls()?,
        [format!("detach{} 10.77.0.1,fd77::1 test/{}", &attached["attach".len()..], pod.id)]
    );
    runtime.expect_clean()
}

#[test]
fn repeated_add_returns_the_same_result_even_after_a_restart() -> Result<()> {
    let mut runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    let result = runtime.add(&pod)?;
    assert_eq!(runtime.add(&pod)?, result);
    runtime.datapath_calls()?;
    runtime.restart()?;
    let recovered = runtime.datapath_calls()?;
    assert!(recovered.len() == 1 && recovered[0].starts_with(&format!("recover {}", host_device(&result))));
    assert_eq!(runtime.add(&pod)?, result);
    assert_eq!(runtime.devices()?.len(), 1);
    assert_eq!(runtime.used()?, [1, 1]);
    // another device of the same container gets its own addresses
    let second = runtime.pod_call("ADD", &pod).set("CNI_IFNAME", "eth1").ok()?;
    assert_eq!(addresses(&second), ["10.77.0.2", "fd77::2"]);
    for ifname in ["eth0", "eth1"] {
        runtime.pod_call("DEL", &pod).set("CNI_IFNAME", ifname).ok()?;
    }
    runtime.expect_clean()
}

#[test]
fn exhausted_range_is_an_error_and_a_freed_address_is_reused() -> Result<()> {
    let runtime = Runtime::new(&["10.77.0.0/29", "fd77::/64"])?;
    let pods = (0..6).map(|_| Container::create()).collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        runtime.add(pod)?;
    }
    let late = Container::create()?;
    let (code, message) = runtime.pod_call("ADD", &late).error()?;
    assert_eq!(code, 100);
    assert_eq!(message, "pod range 10.77.0.0/29 is exhausted: 6 of its 6 addresses are in use");
    assert_eq!(runtime.used()?, [6, 6], "no address of the other family was allocated");
    assert_eq!(runtime.call("STATUS").ok()?, Value::Null);
    runtime.pod_call("DEL", &pods[2]).ok()?;
    assert_eq!(addresses(&runtime.add(&late)?), ["10.77.0.3", "fd77::7"]);
    Ok(())
}

#[test]
fn twenty_concurrent_pods_get_different_addresses() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pods = (0..20).map(|_| Container::create()).collect::<Result<Vec<_>>>()?;
    let results = concurrently(&pods, |pod| runtime.add(pod))?;
    let unique: BTreeSet<String> = results.iter().flat_map(addresses).collect();
    assert_eq!(unique.len(), 40);
    for (pod, result) in pods.iter().zip(&results) {
        assert_eq!(runtime.check(pod, result).ok()?, Value::Null);
    }
    assert_eq!((runtime.devices()?.len(), runtime.records()?.len(), runtime.used()?), (20, 20, vec![20, 20]));
    concurrently(&pods, |pod| runtime.pod_call("DEL", pod).ok())?;
    runtime.expect_clean()
}

#[test]
fn concurrent_calls_for_one_pod_create_one_pod() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    let results = concurrently(&[&pod; 8], |pod| runtime.add(pod))?;
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    assert_eq!((runtime.devices()?.len(), runtime.used()?), (1, vec![1, 1]));
    concurrently(&[&pod; 4], |pod| runtime.pod_call("DEL", pod).ok())?;
    runtime.expect_clean()
}

/// Runs `work` for all concurrently.
fn concurrently<T: Sync>(all: &[T], work: impl Fn(&T) -> Result<Value> + Sync) -> Result<Vec<Value>> {
    thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| work(one))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}
