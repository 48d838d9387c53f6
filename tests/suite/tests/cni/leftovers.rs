//! No resource is left over when agents and pods end at any moment.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    RANGES, addresses, host_device,
    rig::{Container, Runtime},
};

#[test]
fn pod_deleted_without_an_agent_is_removed_when_the_agent_starts() -> Result<()> {
    let mut runtime = Runtime::new(&["10.77.0.0/30", "fd77::/64"])?;
    let (pod, other) = (Container::create()?, Container::create()?);
    runtime.add(&pod)?;
    let stays = runtime.add(&other)?;
    let late = Container::create()?;
    assert_eq!(runtime.pod_call("ADD", &late).error()?.0, 100, "the range is exhausted");
    runtime.kill()?;
    // repeated DEL, and DEL of a device that never existed
    for _ in 0..2 {
        assert_eq!(runtime.pod_call("DEL", &pod).ok()?, Value::Null);
    }
    runtime.pod_call("DEL", &pod).set("CNI_IFNAME", "eth9").ok()?;
    assert_eq!(fs::read_dir(runtime.path("run/gone"))?.count(), 2);
    assert_eq!(pod.ip_json("link show")?.len(), 2, "no agent runs to remove it");

    runtime.start()?;
    assert_eq!(pod.ip_json("link show")?.len(), 1, "only lo is left");
    assert_eq!(fs::read_dir(runtime.path("run/gone"))?.count(), 0);
    assert_eq!((runtime.records()?.len(), runtime.used()?), (1, vec![1, 1]));
    let calls = runtime.datapath_calls()?;
    assert!(calls.last().is_some_and(|line| line.starts_with(&format!("recover {} ", host_device(&stays)))));
    let result = runtime.add(&late)?;
    assert_eq!(addresses(&result)[0], "10.77.0.1", "the only free address");
    assert_eq!(runtime.check(&late, &result).ok()?, Value::Null);
    assert_eq!(runtime.check(&other, &stays).ok()?, Value::Null);

    // without a directory for pending deletes DEL fails
    let nowhere = runtime.pod_call("DEL", &other).with("agentSocket", "/nonexistent/agent.sock");
    assert_eq!(nowhere.error()?.0, 11);
    for pod in [&other, &late] {
        runtime.pod_call("DEL", pod).ok()?;
    }
    runtime.expect_clean()
}

#[test]
fn addresses_of_a_pod_whose_namespace_vanished_are_released() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let (gone, stays) = (Container::create()?, Container::create()?);
    runtime.add(&gone)?;
    let result = runtime.add(&stays)?;
    runtime.datapath_calls()?;
    let (id, del) = (gone.id.clone(), runtime.pod_call("DEL", &gone));
    // drops the name and our open file: the kernel removes the namespace
    drop(gone);
    dataplane_testkit::lab::wait::until("the device is gone", Duration::from_secs(10), || {
        Ok((runtime.devices()?.len() == 1).then_some(()))
    })?;
    assert_eq!(runtime.used()?, [2, 2]);
    // after an error the release is retried next time
    fs::write(runtime.path("run/fail-detach"), "")?;
    runtime.sweep()?;
    assert_eq!((runtime.records()?.len(), runtime.used()?), (2, vec![2, 2]));
    fs::remove_file(runtime.path("run/fail-detach"))?;
    runtime.sweep()?;
    assert_eq!((runtime.records()?.len(), runtime.used()?), (1, vec![1, 1]));
    let calls = runtime.datapath_calls()?;
    let is_detach = |line: &String| line.starts_with("detach ") && line.ends_with(&format!("test/{id}"));
    assert!(calls.len() == 2 && calls.iter().all(is_detach), "{calls:?}");
    assert_eq!(runtime.check(&stays, &result).ok()?, Value::Null);
    // a late DEL succeeds
    del.ok()?;
    runtime.pod_call("DEL", &stays).ok()?;
    runtime.expect_clean()
}

#[test]
fn del_of_a_missing_pod_succeeds() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    runtime.pod_call("DEL", &pod).ok()?;
    runtime.add(&pod)?;
    drop(pod);
    // the namespace is gone, and the runtime omits CNI_NETNS
    let (again, last) = (Container::create()?, Container::create()?);
    runtime.add(&again)?;
    let del = runtime.pod_call("DEL", &again).set("CNI_NETNS", "");
    dataplane_testkit::lab::Namespace::delete(again.namespace.name())?;
    del.ok()?;
    del.ok()?;
    // only the record of the first pod is left: GC removes it
    let valid = json!([{"containerID": last.id, "ifname": "eth0"}]);
    runtime.call("GC").with("cni.dev/valid-attachments", valid).ok()?;
    runtime.expect_clean()
}

#[test]
fn add_that_fails_in_the_datapath_leaves_nothing() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pod = Container::create()?;
    fs::write(runtime.path("run/fail-attach"), "")?;
    let (code, message) = runtime.pod_call("ADD", &pod).error()?;
    assert_eq!(code, 103);
    assert!(message.contains("attach dp") && message.contains("failure requested by the test"), "{message}");
    assert_eq!(runtime.datapath_calls()?.len(), 2, "attach, then detach");
    runtime.expect_clean()?;
    // a pod that cannot be detached keeps its addresses until DEL succeeds
    fs::write(runtime.path("run/fail-detach"), "")?;
    runtime.pod_call("ADD", &pod).error()?;
    assert_eq!(runtime.used()?, [1, 1]);
    assert_eq!(runtime.pod_call("DEL", &pod).error()?.0, 103);
    fs::remove_file(runtime.path("run/fail-detach"))?;
    runtime.pod_call("DEL", &pod).ok()?;
    runtime.expect_clean()
}

#[test]
fn gc_removes_unlisted_pods_of_its_network_only() -> Result<()> {
    let mut runtime = Runtime::new(&RANGES)?;
    let pods = (0..4).map(|_| Container::create()).collect::<Result<Vec<_>>>()?;
    for pod in &pods[..3] {
        runtime.add(pod)?;
    }
    runtime.pod_call("ADD", &pods[3]).with("name", "other").ok()?;
    runtime.restart()?;
    let list = |pods: &[Container]| {
        let valid = pods.iter().map(|pod| json!({"containerID": pod.id, "ifname": "eth0"}));
        Value::Array(valid.collect())
    };
    runtime.call("GC").with("cni.dev/valid-attachments", list(&pods[..1])).ok()?;
    assert_eq!(runtime.used()?, [2, 2]);
    assert_eq!(pods[1].ip_json("link show")?.len(), 1);
    assert_eq!(pods[3].ip_json("link show")?.len(), 2, "a pod of another network stays");
    // the key of a draft of the specification
    runtime.call("GC").with("cni.dev/attachments", json!([])).ok()?;
    runtime.call("GC").with("cni.dev/valid-attachments", json!([])).with("name", "other").ok()?;
    runtime.expect_clean()
}

#[test]
fn pods_survive_the_loss_of_their_records() -> Result<()> {
    let mut runtime = Runtime::new(&["10.77.0.0/29"])?;
    let pods = (0..3).map(|_| Container::create()).collect::<Result<Vec<_>>>()?;
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
    ensure!(log.contains(&format!("pod record {} is invalid", record(1).display())), "{log}");
    assert_eq!(runtime.used()?, [3], "addresses are recovered from kernel routes");
    assert!(directory.join(format!("{}.broken", records[1])).exists());
    // so they are not allocated again
    let more = (0..3).map(|_| Container::create()).collect::<Result<Vec<_>>>()?;
    let allocated =
        more.iter().map(|pod| Ok(addresses(&runtime.add(pod)?))).collect::<Result<Vec<_>>>()?.concat();
    assert_eq!(allocated, ["10.77.0.4", "10.77.0.5", "10.77.0.6"]);
    for pod in pods.iter().chain(&more) {
        runtime.pod_call("DEL", pod).ok()?;
    }
    fs::remove_file(directory.join(format!("{}.broken", records[1])))?;
    runtime.expect_clean()
}

#[test]
fn retry_succeeds_after_the_agent_was_killed_at_any_step() -> Result<()> {
    let mut runtime = Runtime::new(&["10.77.0.0/29", "fd77::/64"])?;
    let pod = Container::create()?;
    let begun = Instant::now();
    runtime.add(&pod)?;
    runtime.pod_call("DEL", &pod).ok()?;
    let usual = begun.elapsed();
    for round in 0..20_u32 {
        // from before the first step of ADD to after the last step of DEL
        let delay = usual * round / 16;
        thread::scope(|scope| {
            let calls = scope.spawn(|| {
                // the result does not matter, but the plugin must print a valid one
                for command in ["ADD", "DEL"] {
                    runtime.pod_call(command, &pod).run().expect("the plugin prints a valid result");
                }
            });
            thread::sleep(delay);
            let killed = kill_agent(&runtime);
            calls.join().expect("no panic");
            killed
        })?;
        runtime.restart()?;
        match round % 3 {
            // the runtime retries ADD
            0 => {
                let result = runtime.add(&pod).with_context(|| format!("round {round}"))?;
                runtime.check(&pod, &result).ok()?;
                runtime.pod_call("DEL", &pod).ok()?;
            }
            // deletes the pod
            1 => drop(runtime.pod_call("DEL", &pod).ok()?),
            // or runs GC
            _ => drop(runtime.call("GC").with("cni.dev/valid-attachments", json!([])).ok()?),
        }
        runtime.expect_clean().with_context(|| format!("round {round}, killed after {delay:?}"))?;
    }
    Ok(())
}

/// Sends SIGKILL to the PID in the agent's lock file.
fn kill_agent(runtime: &Runtime) -> Result<()> {
    let pid = fs::read_to_string(runtime.path("run/agent.lock"))?;
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse()?);
    Ok(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?)
}

#[test]
fn descriptors_do_not_leak_over_many_pods() -> Result<()> {
    let runtime = Runtime::new(&RANGES)?;
    let pid = fs::read_to_string(runtime.path("run/agent.lock"))?;
    let descriptors = || Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{}/fd", pid.trim()))?.count());
    let round = || {
        let pod = Container::create()?;
        runtime.add(&pod)?;
        runtime.pod_call("DEL", &pod).ok()
    };
    round()?;
    let before = descriptors()?;
    let begun = Instant::now();
    for _ in 0..30 {
        round()?;
    }
    eprintln!("ADD and DEL with their processes: {:?}", begun.elapsed() / 30);
    // an open socket would keep a pod's namespace alive
    dataplane_testkit::lab::wait::until("descriptors are closed", Duration::from_secs(5), || {
        Ok((descriptors()? <= before).then_some(()))
    })?;
    runtime.expect_clean()
}
