//! Nothing is ever left over: agents and pods that end at any moment.

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
    dataplane_testkit::lab::wait::until("the device is gone", Duration::from_secs(10), || {
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
    dataplane_testkit::lab::Namespace::delete(again.namespace.name())?;
    del.ok()?;
    del.ok()?;
    // of the first, only the record is left: GC finds it
    let valid = json!([{"containerID": last.id, "ifname": "eth0"}]);
    runtime.call("GC").with("cni.dev/valid-attachments", valid).ok()?;
    runtime.expect_clean()
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
    dataplane_testkit::lab::wait::until("descriptors are closed", Duration::from_secs(5), || {
        Ok((descriptors()? <= before).then_some(()))
    })?;
    runtime.expect_clean()
}
