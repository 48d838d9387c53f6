//! What the allocator may do, and an API server that is away.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_fake_apiserver::{Failure, Fault, Requests, User};
use dataplane_testkit::lab::wait;
use serde_json::{Value, json};

use super::{Bed, PATIENCE, node};

/// The objects of a file below `deploy/`.
fn deployed(file: &str) -> Result<Vec<Value>> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy")).join(file);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let documents = serde_norway::Deserializer::from_str(&text);
    documents.map(|document| Ok(<Value as serde::Deserialize>::deserialize(document)?)).collect()
}

/// What the rules of roles allow, as (verb, group, resource).
fn allowed(objects: &[Value], roles: &[&str]) -> BTreeSet<(String, String, String)> {
    let texts = |rule: &Value, field: &str| -> Vec<String> {
        rule[field]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|text| text.as_str().map(str::to_owned))
            .collect()
    };
    let of_them = |object: &&Value| {
        object["kind"].as_str().is_some_and(|kind| kind.ends_with("Role"))
            && roles.iter().any(|role| object["metadata"]["name"] == *role)
    };
    let mut allowed = BTreeSet::new();
    for rule in objects.iter().filter(of_them).flat_map(|role| role["rules"].as_array().into_iter().flatten())
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
fn a_missing_permission_is_named_and_every_permission_granted_is_used() -> Result<()> {
    let bed = Bed::new()?;
    bed.objects.apply(&[
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dataplane-system"}}),
    ])?;
    bed.add("n0", &[])?;
    let user = User::service_account("dataplane-system", "dataplane-allocator");
    let a = bed.allocator_as("a", &user, "--cluster-cidr 10.1.0.0/16 --lease-namespace dataplane-system")?;
    wait::until("the refusal is in the log", PATIENCE, || {
        let log = fs::read_to_string(&a.log)?;
        let said = "denied list of nodes to system:serviceaccount:dataplane-system:dataplane-allocator";
        Ok(log.contains(said).then_some(()))
    })?;
    ensure!(a.http("/readyz")?.0 == 503);
    let mut objects = deployed("base/rbac.yaml")?;
    objects.extend(deployed("components/allocator/rbac.yaml")?);
    bed.objects.apply(&objects)?;
    bed.wait_all(1)?;
    ensure!(a.http("/readyz")?.0 == 200);

    // somebody else writes a node at the same time; something is wrong with it, twice
    let conflict = Failure::new(409, "Conflict", "the object has been modified");
    bed.server.faults().next(1, Requests::to("patch", "nodes"), Fault::Refuse(conflict));
    bed.add("n1", &[])?;
    bed.wait_all(1)?;
    bed.add("n2", &["192.168.0.0/24"])?;
    bed.wait_event("n2", "PodCIDROutsideCluster")?;
    bed.objects.patch(&node("n2", &[]), &json!({"metadata": {"labels": {"again": "yes"}}}))?;
    let granted = allowed(&objects, &["dataplane-allocator", "dataplane-events"]);
    wait::until("every permission is used", PATIENCE, || {
        let used =
            bed.server.used_permissions(&user).into_iter().map(|used| (used.verb, used.group, used.resource));
        let used: BTreeSet<_> = used.collect();
        ensure!(used.is_subset(&granted), "{used:?} of {granted:?}");
        let unused: Vec<_> = granted.difference(&used).collect();
        ensure!(unused.is_empty(), "these are not: {unused:?}");
        Ok(Some(()))
    })
}

#[test]
fn an_api_server_that_comes_and_goes_stops_nothing_for_long() -> Result<()> {
    let mut bed = Bed::new()?;
    let _a = bed.allocator("a", "--cluster-cidr 10.1.0.0/16")?;
    bed.wait_holder("a")?;
    bed.add("n0", &[])?;
    bed.wait_all(1)?;
    bed.server.stop();
    bed.server.compact();
    bed.server.start()?;
    bed.objects = bed.server.objects()?;
    bed.add("n1", &[])?;
    bed.wait_all(1)?;
    for _ in 0..3 {
        bed.server.faults().next(3, Requests::to("patch", "nodes"), Fault::internal());
        let name = format!("m{}", bed.ranges()?.len());
        bed.add(&name, &[])?;
        bed.wait_all(1)?;
    }
    if bed.ranges()?.len() != 5 {
        bail!("{:?}", bed.ranges()?);
    }
    Ok(())
}
