//! Permissions of the allocator, and an API server that fails.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_fake_apiserver::{Failure, Fault, Requests, User};
use dataplane_testkit::lab::wait;
use serde_json::{Value, json};

use super::{TIMEOUT, Testbed, node};

/// The objects of a file in `deploy/`.
fn deployed(file: &str) -> Result<Vec<Value>> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy")).join(file);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let documents = serde_norway::Deserializer::from_str(&text);
    documents.map(|document| Ok(<Value as serde::Deserialize>::deserialize(document)?)).collect()
}

/// The permissions of roles, as (verb, group, resource).
fn allowed(objects: &[Value], roles: &[&str]) -> BTreeSet<(String, String, String)> {
    let texts = |rule: &Value, field: &str| -> Vec<String> {
        rule[field]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|text| text.as_str().map(str::to_owned))
            .collect()
    };
    let is_selected = |object: &&Value| {
        object["kind"].as_str().is_some_and(|kind| kind.ends_with("Role"))
            && roles.iter().any(|role| object["metadata"]["name"] == *role)
    };
    let mut allowed = BTreeSet::new();
    for rule in
        objects.iter().filter(is_selected).flat_map(|role| role["rules"].as_array().into_iter().flatten())
    {
        for verb in texts(rule, "verbs") {
            for group in texts(rule, "apiGroups") {
                for resource in texts(rule, "resources") {
                    allowed.insert((verb.clone(), group.clone(), resource));
                }
            }
        }
    }
    allowed
}

#[test]
fn missing_permissions_are_logged_and_every_granted_one_is_used() -> Result<()> {
    let testbed = Testbed::new()?;
    testbed.objects.apply(&[
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dataplane-system"}}),
    ])?;
    testbed.add("n0", &[])?;
    let user = User::service_account("dataplane-system", "dataplane-allocator");
    let a =
        testbed.allocator_as("a", &user, "--cluster-cidr 10.1.0.0/16 --lease-namespace dataplane-system")?;
    wait::until("the missing permission is logged", TIMEOUT, || {
        let log = fs::read_to_string(&a.log)?;
        let message = "denied list of nodes to system:serviceaccount:dataplane-system:dataplane-allocator";
        Ok(log.contains(message).then_some(()))
    })?;
    ensure!(a.http("/readyz")?.0 == 503);
    let mut objects = deployed("base/rbac.yaml")?;
    objects.extend(deployed("components/allocator/rbac.yaml")?);
    testbed.objects.apply(&objects)?;
    testbed.wait_all(1)?;
    ensure!(a.http("/readyz")?.0 == 200);

    // a conflicting write, and an Event that is repeated: both need further permissions
    let conflict = Failure::new(409, "Conflict", "the object has been modified");
    testbed.server.faults().next(1, Requests::to("patch", "nodes"), Fault::Refuse(conflict));
    testbed.add("n1", &[])?;
    testbed.wait_all(1)?;
    testbed.add("n2", &["192.168.0.0/24"])?;
    testbed.wait_event("n2", "PodCIDROutsideCluster")?;
    testbed.objects.patch(&node("n2", &[]), &json!({"metadata": {"labels": {"again": "yes"}}}))?;
    let granted = allowed(&objects, &["dataplane-allocator", "dataplane-events"]);
    wait::until("every permission is used", TIMEOUT, || {
        let used = testbed
            .server
            .used_permissions(&user)
            .into_iter()
            .map(|used| (used.verb, used.group, used.resource));
        let used: BTreeSet<_> = used.collect();
        ensure!(used.is_subset(&granted), "{used:?} of {granted:?}");
        let unused: Vec<_> = granted.difference(&used).collect();
        ensure!(unused.is_empty(), "unused permissions: {unused:?}");
        Ok(Some(()))
    })
}

#[test]
fn allocation_continues_after_api_server_failures() -> Result<()> {
    let mut testbed = Testbed::new()?;
    let _a = testbed.allocator("a", "--cluster-cidr 10.1.0.0/16")?;
    testbed.wait_holder("a")?;
    testbed.add("n0", &[])?;
    testbed.wait_all(1)?;
    testbed.server.stop();
    testbed.server.compact();
    testbed.server.start()?;
    testbed.objects = testbed.server.objects()?;
    testbed.add("n1", &[])?;
    testbed.wait_all(1)?;
    for _ in 0..3 {
        testbed.server.faults().next(3, Requests::to("patch", "nodes"), Fault::internal());
        let name = format!("m{}", testbed.ranges()?.len());
        testbed.add(&name, &[])?;
        testbed.wait_all(1)?;
    }
    if testbed.ranges()?.len() != 5 {
        bail!("{:?}", testbed.ranges()?);
    }
    Ok(())
}
