//! The plugin and the agent's CNI server, driven as a runtime does: environment, stdin, exit code, stdout; real
//! namespaces, real devices. What a call means to the specification is tested here, and that nothing is ever left over.

use std::{
    collections::BTreeSet,
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_tests::cni::{Call, Container, NODE_V4, NODE_V6, Runtime};
use serde_json::{Value, json};

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
fn a_pod_gets_its_network_and_loses_it() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    let result = runtime.add(&pod)?;
    assert_eq!(addresses(&result), ["10.77.0.1", "fd77::1"]);
    let device = host_device(&result).to_owned();

    // inside
    let link = pod.ask("-d link show eth0")?.remove(0);
    assert_eq!((&link["mtu"], &link["address"]), (&json!(1450), &result["interfaces"][1]["mac"]));
    let found = pod.ask("addr show dev eth0")?.remove(0);
    let found = found["addr_info"].as_array().context("no addresses")?.clone();
    assert_eq!(column(&found, "local"), ["10.77.0.1", "fd77::1"], "no link-local address of its own");
    assert_eq!((&found[0]["prefixlen"], &found[1]["prefixlen"]), (&json!(32), &json!(128)));
    assert!(found.iter().all(|address| address.get("tentative").is_none()), "{found:?}");
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        let routes = pod.ask(&format!("{family} route show"))?;
        assert!(
            routes.iter().any(|route| route["dst"] == "default" && route["gateway"] == gateway),
            "{routes:?}"
        );
        let neighbours = pod.ask(&format!("{family} neigh show dev eth0"))?;
        let expected = (&json!(gateway), &json!("0e:da:7a:00:00:01"), &json!(["PERMANENT"]));
        let neighbour = &neighbours[0];
        assert_eq!((&neighbour["dst"], &neighbour["lladdr"], &neighbour["state"]), expected);
    }

    // on the node
    let link = runtime.ask(&format!("link show {device}"))?.remove(0);
    assert_eq!((&link["mtu"], &link["address"]), (&json!(1450), &json!("0e:da:7a:00:00:01")));
    for (family, address) in [("-4", "10.77.0.1"), ("-6", "fd77::1")] {
        let routes = runtime.ask(&format!("{family} route show proto 218"))?;
        assert_eq!(
            (column(&routes, "dst"), column(&routes, "dev")),
            (vec![address.into()], vec![device.clone()])
        );
    }
    let attached =
        format!("attach {device} {} {}", link["ifindex"], result["interfaces"][1]["mac"].as_str().unwrap());
    assert_eq!(runtime.told()?, [format!("{attached} 10.77.0.1,fd77::1 test/{}", pod.id)]);

    // packets, by the kernel alone
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

    assert_eq!(runtime.about("DEL", &pod).ok()?, Value::Null);
    assert_eq!(pod.ask("link show")?.len(), 1, "only lo is left");
    assert_eq!(
        runtime.told()?,
        [format!("detach{} 10.77.0.1,fd77::1 test/{}", &attached["attach".len()..], pod.id)]
    );
    runtime.expect_clean()
}

#[test]
fn every_version_gets_a_result_of_its_own_form() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = runtime.container()?;
        let result = runtime.about("ADD", &pod).with("cniVersion", version).ok()?;
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
        assert_eq!(runtime.about("DEL", &pod).with("cniVersion", version).ok()?, Value::Null);
    }
    runtime.expect_clean()
}

#[test]
fn the_plugin_tells_its_versions_whoever_asks() -> Result<()> {
    let nobody = std::path::Path::new("/nonexistent/agent.sock");
    for (asked, answered) in [("0.4.0", "0.4.0"), ("1.1.0", "1.1.0"), ("9.0.0", "1.1.0")] {
        let versions = Call::new("VERSION", nobody, asked).ok()?;
        let expected =
            json!({"cniVersion": answered, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]});
        assert_eq!(versions, expected);
    }
    Ok(())
}

#[test]
fn a_wrong_call_is_refused_by_its_code_and_names_what_is_wrong() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    let add = || runtime.about("ADD", &pod);
    let too_old = |command: &str, version: &str| runtime.about(command, &pod).with("cniVersion", version);
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
        (runtime.about("CHECK", &pod), 7, "prevResult"),
        (runtime.call("GC"), 7, "cni.dev/valid-attachments"),
    ] {
        let (found, message) = call.refused().with_context(|| format!("{call:?}"))?;
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
fn an_agent_that_is_not_there_is_a_matter_of_time() -> Result<()> {
    let mut runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    let result = runtime.add(&pod)?;
    runtime.kill()?;
    for (call, expected) in
        [(runtime.about("ADD", &pod), 11), (runtime.check(&pod, &result), 11), (runtime.call("STATUS"), 50)]
    {
        let (code, message) = call.refused()?;
        assert_eq!(code, expected, "{message}");
        assert!(message.starts_with("the agent cannot be reached at "), "{message}");
    }
    runtime.start()?;
    runtime.about("DEL", &pod).ok()?;
    runtime.expect_clean()
}

#[test]
fn a_pod_deleted_while_no_agent_runs_is_gone_once_one_does() -> Result<()> {
    let mut runtime = Runtime::new(&["10.77.0.0/30", "fd77::/64"])?;
    let (pod, other) = (runtime.container()?, runtime.container()?);
    runtime.add(&pod)?;
    let stays = runtime.add(&other)?;
    let late = runtime.container()?;
    assert_eq!(runtime.about("ADD", &late).refused()?.0, 100, "the range is exhausted");
    runtime.kill()?;
    // as often as the runtime likes, and for what was never there
    for _ in 0..2 {
        assert_eq!(runtime.about("DEL", &pod).ok()?, Value::Null);
    }
    runtime.about("DEL", &pod).set("CNI_IFNAME", "eth9").ok()?;
    assert_eq!(fs::read_dir(runtime.path("run/gone"))?.count(), 2);
    assert_eq!(pod.ask("link show")?.len(), 2, "nobody was there to remove it");

    runtime.start()?;
    assert_eq!(pod.ask("link show")?.len(), 1, "only lo is left");
    assert_eq!(fs::read_dir(runtime.path("run/gone"))?.count(), 0);
    assert_eq!((runtime.records()?.len(), runtime.used()?), (1, vec![1, 1]));
    let told = runtime.told()?;
    assert!(told.last().is_some_and(|line| line.starts_with(&format!("recover {} ", host_device(&stays)))));
    let result = runtime.add(&late)?;
    assert_eq!(addresses(&result)[0], "10.77.0.1", "the only one that was free again");
    assert_eq!(runtime.check(&late, &result).ok()?, Value::Null);
    assert_eq!(runtime.check(&other, &stays).ok()?, Value::Null);

    // where no agent would look, none is waited for either
    let nowhere = runtime.about("DEL", &other).with("agentSocket", "/nonexistent/agent.sock");
    assert_eq!(nowhere.refused()?.0, 11);
    for pod in [&other, &late] {
        runtime.about("DEL", pod).ok()?;
    }
    runtime.expect_clean()
}

#[test]
fn a_pod_whose_namespace_went_without_a_word_does_not_keep_its_addresses() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let (gone, stays) = (runtime.container()?, runtime.container()?);
    runtime.add(&gone)?;
    let result = runtime.add(&stays)?;
    runtime.told()?;
    let (id, del) = (gone.id.clone(), runtime.about("DEL", &gone));
    // its name and our own hold on it: the namespace goes
    drop(gone);
    dataplane_tests::lab::wait::until("the device is gone", Duration::from_secs(10), || {
        Ok((runtime.devices()?.len() == 1).then_some(()))
    })?;
    assert_eq!(runtime.used()?, [2, 2]);
    // what cannot be released is left for the next time
    fs::write(runtime.path("run/fail-detach"), "")?;
    runtime.sweep()?;
    assert_eq!((runtime.records()?.len(), runtime.used()?), (2, vec![2, 2]));
    fs::remove_file(runtime.path("run/fail-detach"))?;
    runtime.sweep()?;
    assert_eq!((runtime.records()?.len(), runtime.used()?), (1, vec![1, 1]));
    let told = runtime.told()?;
    let of_gone = |line: &String| line.starts_with("detach ") && line.ends_with(&format!("test/{id}"));
    assert!(told.len() == 2 && told.iter().all(of_gone), "{told:?}");
    assert_eq!(runtime.check(&stays, &result).ok()?, Value::Null);
    // a runtime that remembers it after all
    del.ok()?;
    runtime.about("DEL", &stays).ok()?;
    runtime.expect_clean()
}

#[test]
fn a_node_without_a_range_is_not_ready() -> Result<()> {
    let mut runtime = Runtime::new(&[])?;
    let pod = runtime.container()?;
    assert_eq!(runtime.call("STATUS").refused()?.0, 50);
    let (code, message) = runtime.about("ADD", &pod).refused()?;
    assert_eq!((code, message.contains("no pod range yet")), (11, true), "{message}");
    runtime.about("DEL", &pod).ok()?;
    runtime.set_ranges(&RANGES);
    runtime.restart()?;
    assert_eq!(runtime.call("STATUS").ok()?, Value::Null);
    runtime.add(&pod)?;
    Ok(())
}

#[test]
fn asked_again_it_answers_the_same_and_after_a_restart_too() -> Result<()> {
    let mut runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    let result = runtime.add(&pod)?;
    assert_eq!(runtime.add(&pod)?, result);
    runtime.told()?;
    runtime.restart()?;
    let recovered = runtime.told()?;
    assert!(recovered.len() == 1 && recovered[0].starts_with(&format!("recover {}", host_device(&result))));
    assert_eq!(runtime.add(&pod)?, result);
    assert_eq!(runtime.devices()?.len(), 1);
    assert_eq!(runtime.used()?, [1, 1]);
    // another device of the same container is another pod address
    let second = runtime.about("ADD", &pod).set("CNI_IFNAME", "eth1").ok()?;
    assert_eq!(addresses(&second), ["10.77.0.2", "fd77::2"]);
    for ifname in ["eth0", "eth1"] {
        runtime.about("DEL", &pod).set("CNI_IFNAME", ifname).ok()?;
    }
    runtime.expect_clean()
}

#[test]
fn a_pod_that_is_spoilt_fails_its_check_and_is_made_anew() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    let mut result = runtime.add(&pod)?;
    let device = host_device(&result).to_owned();
    assert_eq!(runtime.check(&pod, &result).ok()?, Value::Null);
    let spoils: [(&dyn Fn() -> Result<String>, &str); 7] = [
        (&|| pod.namespace.ip("addr del fd77::1/128 dev eth0"), "eth0 in the pod does not have fd77::1"),
        (&|| pod.namespace.ip("route del default"), "the pod has no IPv4 default route"),
        (&|| pod.namespace.ip("neigh del fe80::1 dev eth0"), "no permanent neighbour fe80::1"),
        (&|| pod.namespace.ip("link set eth0 down"), "eth0 in the pod is down"),
        (&|| runtime.namespace.ip(&format!("link set {device} down")), &format!("device {device} is down")),
        (&|| runtime.namespace.ip("route flush proto 218"), "the node has no route to 10.77.0."),
        (&|| runtime.namespace.ip(&format!("link del {device}")), &format!("device {device} does not exist")),
    ];
    for (spoil, text) in spoils {
        spoil()?;
        let (code, message) = runtime.check(&pod, &result).refused()?;
        assert_eq!(code, 104, "{message}");
        assert!(message.contains(text), "{text} in {message}");
        // each repair gives new addresses: only the first spoil may name one
        result = runtime.add(&pod)?;
        assert_eq!(runtime.check(&pod, &result).ok()?, Value::Null);
    }
    runtime.about("DEL", &pod).ok()?;
    runtime.expect_clean()
}

#[test]
fn a_check_compares_what_the_runtime_remembers() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let (pod, other) = (runtime.container()?, runtime.container()?);
    let result = runtime.add(&pod)?;
    let mut wrong = result.clone();
    wrong["ips"][0]["address"] = json!("10.77.0.9/32");
    let (code, message) = runtime.check(&pod, &wrong).refused()?;
    assert_eq!(code, 104);
    assert!(
        message.contains("10.77.0.9 is not") && message.contains("10.77.0.1 of this pod is missing"),
        "{message}"
    );
    // never added
    wrong["interfaces"][1]["sandbox"] = json!(other.netns());
    assert_eq!(runtime.check(&other, &wrong).refused()?.0, 3);
    // not taken by the datapath
    fs::write(runtime.path("run/fail-check"), "")?;
    let (code, message) = runtime.check(&pod, &result).refused()?;
    assert_eq!((code, message.contains("datapath")), (104, true), "{message}");
    Ok(())
}

#[test]
fn what_is_gone_already_is_removed_without_a_word() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    runtime.about("DEL", &pod).ok()?;
    runtime.add(&pod)?;
    drop(pod);
    // the namespace is gone; a runtime that knows this says nothing of it
    let (again, last) = (runtime.container()?, runtime.container()?);
    runtime.add(&again)?;
    let del = runtime.about("DEL", &again).set("CNI_NETNS", "");
    dataplane_tests::lab::Namespace::delete(again.namespace.name())?;
    del.ok()?;
    del.ok()?;
    // of the first, only the record is left: GC finds it
    let valid = json!([{"containerID": last.id, "ifname": "eth0"}]);
    runtime.call("GC").with("cni.dev/valid-attachments", valid).ok()?;
    runtime.expect_clean()
}

#[test]
fn an_exhausted_range_is_told_and_a_freed_address_used_again() -> Result<()> {
    let runtime = Runtime::new(&["10.77.0.0/29", "fd77::/64"])?;
    let pods = (0..6).map(|_| runtime.container()).collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        runtime.add(pod)?;
    }
    let late = runtime.container()?;
    let (code, message) = runtime.about("ADD", &late).refused()?;
    assert_eq!(code, 100);
    assert_eq!(message, "pod range 10.77.0.0/29 is exhausted: 6 of its 6 addresses are in use");
    assert_eq!(runtime.used()?, [6, 6], "the other family gave nothing");
    assert_eq!(runtime.call("STATUS").ok()?, Value::Null);
    runtime.about("DEL", &pods[2]).ok()?;
    assert_eq!(addresses(&runtime.add(&late)?), ["10.77.0.3", "fd77::7"]);
    Ok(())
}

#[test]
fn a_pod_the_datapath_refuses_leaves_nothing() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    fs::write(runtime.path("run/fail-attach"), "")?;
    let (code, message) = runtime.about("ADD", &pod).refused()?;
    assert_eq!(code, 103);
    assert!(message.contains("attach dp") && message.contains("the test wants it so"), "{message}");
    assert_eq!(runtime.told()?.len(), 2, "attach, and detach all the same");
    runtime.expect_clean()?;
    // one that cannot be undone keeps its address until it can
    fs::write(runtime.path("run/fail-detach"), "")?;
    runtime.about("ADD", &pod).refused()?;
    assert_eq!(runtime.used()?, [1, 1]);
    assert_eq!(runtime.about("DEL", &pod).refused()?.0, 103);
    fs::remove_file(runtime.path("run/fail-detach"))?;
    runtime.about("DEL", &pod).ok()?;
    runtime.expect_clean()
}

#[test]
fn a_device_name_the_container_has_already_is_refused() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    pod.namespace.ip("link add eth0 type veth peer name other")?;
    let (code, message) = runtime.about("ADD", &pod).refused()?;
    assert_eq!(code, 101);
    assert!(message.contains("eth0") && message.contains("File exists"), "{message}");
    assert_eq!(pod.ask("link show")?.len(), 3, "the container's own devices are left alone");
    runtime.expect_clean()
}

#[test]
fn twenty_pods_at_once_get_twenty_addresses() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pods = (0..20).map(|_| runtime.container()).collect::<Result<Vec<_>>>()?;
    let results = at_once(&pods, |pod| runtime.add(pod))?;
    let unique: BTreeSet<String> = results.iter().flat_map(addresses).collect();
    assert_eq!(unique.len(), 40);
    for (pod, result) in pods.iter().zip(&results) {
        assert_eq!(runtime.check(pod, result).ok()?, Value::Null);
    }
    assert_eq!((runtime.devices()?.len(), runtime.records()?.len(), runtime.used()?), (20, 20, vec![20, 20]));
    at_once(&pods, |pod| runtime.about("DEL", pod).ok())?;
    runtime.expect_clean()
}

#[test]
fn the_same_pod_at_once_is_one_pod() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = runtime.container()?;
    let results = at_once(&[&pod; 8], |pod| runtime.add(pod))?;
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    assert_eq!((runtime.devices()?.len(), runtime.used()?), (1, vec![1, 1]));
    at_once(&[&pod; 4], |pod| runtime.about("DEL", pod).ok())?;
    runtime.expect_clean()
}

#[test]
fn what_the_runtime_does_not_list_is_collected_in_its_network_only() -> Result<()> {
    let mut runtime = Runtime::new(&RANGES)?;
    let pods = (0..4).map(|_| runtime.container()).collect::<Result<Vec<_>>>()?;
    for pod in &pods[..3] {
        runtime.add(pod)?;
    }
    runtime.about("ADD", &pods[3]).with("name", "other").ok()?;
    runtime.restart()?;
    let list = |pods: &[Container]| {
        let valid = pods.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"}));
        Value::Array(valid.collect())
    };
    runtime.call("GC").with("cni.dev/valid-attachments", list(&pods[..1])).ok()?;
    assert_eq!(runtime.used()?, [2, 2]);
    assert_eq!(pods[1].ask("link show")?.len(), 1);
    assert_eq!(pods[3].ask("link show")?.len(), 2, "a pod of another network stays");
    // a list may be under the name of a draft
    runtime.call("GC").with("cni.dev/attachments", json!([])).ok()?;
    runtime.call("GC").with("cni.dev/valid-attachments", json!([])).with("name", "other").ok()?;
    runtime.expect_clean()
}

#[test]
fn pods_outlive_the_loss_of_their_records() -> Result<()> {
    let mut runtime = Runtime::new(&["10.77.0.0/29"])?;
    let pods = (0..3).map(|_| runtime.container()).collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        runtime.add(pod)?;
    }
    let records: Vec<String> = runtime.records()?.into_iter().collect();
    let directory = runtime.path("state/pods");
    let record = |index: usize| directory.join(&records[index]);
    fs::remove_file(record(0))?;
    fs::write(record(1), "{ no record")?;
    runtime.restart()?;
    let log = fs::read_to_string(runtime.path("agent.log"))?;
    ensure!(log.contains(&format!("{} is no record of a pod", record(1).display())), "{log}");
    assert_eq!(runtime.used()?, [3], "the kernel's routes tell the addresses of all");
    assert!(directory.join(format!("{}.broken", records[1])).exists());
    // so nobody else gets them
    let more = (0..3).map(|_| runtime.container()).collect::<Result<Vec<_>>>()?;
    let given =
        more.iter().map(|pod| Ok(addresses(&runtime.add(pod)?))).collect::<Result<Vec<_>>>()?.concat();
    assert_eq!(given, ["10.77.0.4", "10.77.0.5", "10.77.0.6"]);
    for pod in pods.iter().chain(&more) {
        runtime.about("DEL", pod).ok()?;
    }
    fs::remove_file(directory.join(format!("{}.broken", records[1])))?;
    runtime.expect_clean()
}

#[test]
fn an_agent_killed_at_any_step_leaves_nothing_a_retry_does_not_mend() -> Result<()> {
    let mut runtime = Runtime::new(&["10.77.0.0/29", "fd77::/64"])?;
    let pod = runtime.container()?;
    let begun = Instant::now();
    runtime.add(&pod)?;
    runtime.about("DEL", &pod).ok()?;
    let usual = begun.elapsed();
    for round in 0..20_u32 {
        // from before the first step to after the last one, of both
        let delay = usual * round / 16;
        thread::scope(|scope| {
            let calls = scope.spawn(|| {
                // what a killed agent answers is no matter; that the plugin then says something valid is
                for command in ["ADD", "DEL"] {
                    runtime.about(command, &pod).run().expect("the plugin answers");
                }
            });
            thread::sleep(delay);
            let killed = kill_agent(&runtime);
            calls.join().expect("no panic");
            killed
        })?;
        runtime.restart()?;
        match round % 3 {
            // the runtime retries the pod
            0 => {
                let result = runtime.add(&pod).with_context(|| format!("round {round}"))?;
                runtime.check(&pod, &result).ok()?;
                runtime.about("DEL", &pod).ok()?;
            }
            // gives it up
            1 => drop(runtime.about("DEL", &pod).ok()?),
            // or has forgotten it
            _ => drop(runtime.call("GC").with("cni.dev/valid-attachments", json!([])).ok()?),
        }
        runtime.expect_clean().with_context(|| format!("round {round}, killed after {delay:?}"))?;
    }
    Ok(())
}

/// SIGKILL by the pid the agent itself wrote down.
fn kill_agent(runtime: &Runtime) -> Result<()> {
    let pid = fs::read_to_string(runtime.path("run/agent.lock"))?;
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse()?);
    Ok(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?)
}

#[test]
fn nothing_piles_up_over_many_pods() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pid = fs::read_to_string(runtime.path("run/agent.lock"))?;
    let descriptors = || Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{}/fd", pid.trim()))?.count());
    let round = || {
        let pod = runtime.container()?;
        runtime.add(&pod)?;
        runtime.about("DEL", &pod).ok()
    };
    round()?;
    let before = descriptors()?;
    let begun = Instant::now();
    for _ in 0..30 {
        round()?;
    }
    eprintln!("ADD and DEL: {:?} with the processes of both calls", begun.elapsed() / 30);
    // an open socket would keep a pod's namespace alive
    dataplane_tests::lab::wait::until("descriptors are closed", Duration::from_secs(5), || {
        Ok((descriptors()? <= before).then_some(()))
    })?;
    runtime.expect_clean()
}

/// Does the same for all, in parallel.
fn at_once<T: Sync>(all: &[T], work: impl Fn(&T) -> Result<Value> + Sync) -> Result<Vec<Value>> {
    thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| work(one))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}
