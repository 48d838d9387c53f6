//! Prepares an object for storage: metadata, types, defaults. [`validate`](super::validate) rejects
//! invalid objects.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
};

use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{ConfigMap, Event, Namespace, Node, Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
        events::v1::Event as NewEvent,
        networking::v1::ServiceCIDR,
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
    jiff::Timestamp,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    failure::Failure,
    resources::Resource,
    store::{Key, Store},
    validate::validate,
};

/// Metadata fields that only the server writes.
const SERVER_FIELDS: [&str; 3] = ["uid", "creationTimestamp", "deletionTimestamp"];

/// Returns the new object with defaults, and its key; `generateName` becomes a name.
pub(super) fn create(
    store: &Store,
    resource: &'static Resource,
    namespace: &str,
    object: &Value,
) -> Result<(Key, Value), Failure> {
    let mut object = decode(resource, object)?;
    let name = match text(&object["metadata"], "name") {
        "" => match text(&object["metadata"], "generateName") {
            "" => {
                return Err(Failure::invalid(
                    resource,
                    "",
                    "metadata.name: Required value: name or generateName is required",
                ));
            }
            prefix => format!("{prefix}{}", &uuid()?[..5]),
        },
        name => name.to_owned(),
    };
    if !text(&object["metadata"], "resourceVersion").is_empty() {
        let problem = "resourceVersion should not be set on objects to be created";
        return Err(Failure::new(500, "InternalError", problem));
    }
    check_name_and_namespace(store, resource, namespace, &name, &object)?;
    object["metadata"]["name"] = json!(name);
    if resource.namespaced {
        object["metadata"]["namespace"] = json!(namespace);
    }
    object["metadata"]["uid"] = json!(uuid()?);
    object["metadata"]["creationTimestamp"] = json!(now());
    let key = Key { resource, namespace: namespace.to_owned(), name };
    set_defaults(store, &key, &mut object, None)?;
    validate(&key, &object, None)?;
    Ok((key, object))
}

/// Returns the updated object. `subresource`: only the status changes; otherwise all but the
/// status.
pub(super) fn update(
    store: &Store,
    key: &Key,
    old: &Value,
    new: &Value,
    subresource: Option<&str>,
) -> Result<Value, Failure> {
    let mut new = decode(key.resource, new)?;
    let uid = text(&new["metadata"], "uid");
    if !uid.is_empty() && old["metadata"]["uid"] != uid {
        let problem = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(&old["metadata"], "uid")
        );
        return Err(Failure::conflict(key.resource, &key.name, &problem));
    }
    for field in ["namespace", "name"] {
        let given = text(&new["metadata"], field);
        let kept = text(&old["metadata"], field);
        if !given.is_empty() && given != kept {
            let problem =
                format!("the {field} of the provided object does not match the {field} sent on the request");
            return Err(Failure::bad_request(problem));
        }
        if !kept.is_empty() {
            new["metadata"][field] = json!(kept);
        }
    }
    for field in SERVER_FIELDS {
        match old["metadata"].get(field) {
            Some(value) => new["metadata"][field] = value.clone(),
            None => {
                new["metadata"].as_object_mut().map(|metadata| metadata.remove(field));
            }
        }
    }
    if subresource.is_some() {
        let mut changed = old.clone();
        set(&mut changed, "status", new.get("status"));
        // the real server also takes these from a status update
        for field in ["labels", "annotations"] {
            set(&mut changed["metadata"], field, new["metadata"].get(field));
        }
        changed["metadata"]["resourceVersion"] = new["metadata"]["resourceVersion"].clone();
        new = changed;
    } else if key.resource.status {
        set(&mut new, "status", old.get("status"));
    }
    set_defaults(store, key, &mut new, Some(old))?;
    validate(key, &new, Some(old))?;
    Ok(new)
}

/// Decodes the object as its Kubernetes type: wrong types are rejected, unknown fields dropped.
fn decode(resource: &'static Resource, object: &Value) -> Result<Value, Failure> {
    fn round_trip<T: DeserializeOwned + Serialize>(object: &Value) -> serde_json::Result<Value> {
        serde_json::to_value(T::deserialize(object)?)
    }
    let mut object = object.clone();
    if !object.is_object() {
        return Err(Failure::bad_request("the body of the request is not an object"));
    }
    for (field, wanted) in [("apiVersion", resource.api_version()), ("kind", resource.kind.to_owned())] {
        let given = text(&object, field);
        if !given.is_empty() && given != wanted {
            let problem =
                format!("the {field} in the data ({given}) does not match the expected one ({wanted})");
            return Err(Failure::bad_request(problem));
        }
        object[field] = json!(wanted);
    }
    let decoded = match (resource.group, resource.kind) {
        (_, "Node") => round_trip::<Node>(&object),
        (_, "Namespace") => round_trip::<Namespace>(&object),
        (_, "Service") => round_trip::<Service>(&object),
        (_, "Pod") => round_trip::<Pod>(&object),
        ("", "Event") => round_trip::<Event>(&object),
        (_, "Event") => round_trip::<NewEvent>(&object),
        (_, "ConfigMap") => round_trip::<ConfigMap>(&object),
        (_, "ServiceAccount") => round_trip::<ServiceAccount>(&object),
        (_, "EndpointSlice") => round_trip::<EndpointSlice>(&object),
        (_, "ServiceCIDR") => round_trip::<ServiceCIDR>(&object),
        (_, "Lease") => round_trip::<Lease>(&object),
        (_, "ClusterRole") => round_trip::<ClusterRole>(&object),
        (_, "ClusterRoleBinding") => round_trip::<ClusterRoleBinding>(&object),
        (_, "Role") => round_trip::<Role>(&object),
        (_, "RoleBinding") => round_trip::<RoleBinding>(&object),
        (_, kind) => return Err(Failure::bad_request(format!("no type for {kind}"))),
    };
    decoded.map_err(|error| {
        let (kind, version) = (resource.kind, resource.version);
        Failure::bad_request(format!(
            "{kind} in version \"{version}\" cannot be handled as a {kind}: json: {error}"
        ))
    })
}

fn check_name_and_namespace(
    store: &Store,
    resource: &'static Resource,
    namespace: &str,
    name: &str,
    object: &Value,
) -> Result<(), Failure> {
    let is_name_character = |character: char| {
        character.is_ascii_lowercase() || character.is_ascii_digit() || matches!(character, '.' | '-')
    };
    // RBAC names may have other characters
    if !resource.group.starts_with("rbac") && !name.chars().all(is_name_character) {
        let problem = format!(
            "metadata.name: Invalid value: \"{name}\": a lowercase RFC 1123 subdomain must consist of lower case \
             alphanumeric characters, '-' or '.'"
        );
        return Err(Failure::invalid(resource, name, &problem));
    }
    if !resource.namespaced {
        return Ok(());
    }
    if namespace.is_empty() {
        return Err(Failure::bad_request("an empty namespace may not be set during creation"));
    }
    let given = text(&object["metadata"], "namespace");
    if !given.is_empty() && given != namespace {
        return Err(Failure::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let namespaces = Resource::named("v1", "Namespace").expect("namespaces are in the list of kinds");
    let key = Key { resource: namespaces, namespace: String::new(), name: namespace.to_owned() };
    match store.get(&key) {
        Some(_) => Ok(()),
        None => Err(Failure::not_found(namespaces, namespace)),
    }
}

/// Sets defaults and fields that are derived from other fields.
fn set_defaults(store: &Store, key: &Key, object: &mut Value, old: Option<&Value>) -> Result<(), Failure> {
    match key.resource.kind {
        "Node" => {
            let (one, all) =
                (object["spec"].get("podCIDR").cloned(), object["spec"].get("podCIDRs").cloned());
            let first = all.as_ref().and_then(|all| all.get(0)).cloned();
            match (one, first) {
                (Some(one), None) if one != "" => object["spec"]["podCIDRs"] = json!([one]),
                // the list has precedence, as in the real conversion
                (_, Some(first)) => object["spec"]["podCIDR"] = first,
                _ => {}
            }
        }
        "Namespace" if old.is_none() => object["status"] = json!({"phase": "Active"}),
        "Pod" if old.is_none() => object["status"] = json!({"phase": "Pending"}),
        "Service" => set_service_defaults(store, key, object, old)?,
        _ => {}
    }
    Ok(())
}

fn set_service_defaults(
    store: &Store,
    key: &Key,
    object: &mut Value,
    old: Option<&Value>,
) -> Result<(), Failure> {
    if old.is_none() {
        object["status"] = json!({"loadBalancer": {}});
    }
    let spec = &mut object["spec"];
    let default = |spec: &mut Value, field: &str, value: Value| {
        if spec.get(field).is_none() {
            spec[field] = value;
        }
    };
    default(spec, "type", json!("ClusterIP"));
    default(spec, "sessionAffinity", json!("None"));
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        default(port, "protocol", json!("TCP"));
        let same = port["port"].clone();
        default(port, "targetPort", same);
    }
    if spec["type"] == "ExternalName" {
        return Ok(());
    }
    default(spec, "internalTrafficPolicy", json!("Cluster"));
    for field in ["clusterIP", "clusterIPs"] {
        if let Some(kept) = old.and_then(|old| old["spec"].get(field)) {
            default(spec, field, kept.clone());
        }
    }
    let given = spec.get("clusterIPs").and_then(|all| all.get(0)).or_else(|| spec.get("clusterIP"));
    let first = match given.and_then(Value::as_str).unwrap_or_default() {
        "" => allocate_cluster_ip(store, key)?,
        given => given.to_owned(),
    };
    if spec.get("clusterIPs").and_then(|all| all.get(0)).is_none() {
        spec["clusterIPs"] = json!([first]);
    }
    spec["clusterIP"] = json!(first);
    let families: Vec<&str> = spec["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|address| address.as_str()?.parse::<IpAddr>().ok())
        .map(|address| if address.is_ipv4() { "IPv4" } else { "IPv6" })
        .collect();
    if families.is_empty() {
        default(spec, "ipFamilies", json!(["IPv4", "IPv6"]));
    } else {
        spec["ipFamilies"] = json!(families);
    }
    let policy = if families.len() == 1 { "SingleStack" } else { "RequireDualStack" };
    default(spec, "ipFamilyPolicy", json!(policy));
    Ok(())
}

/// Allocates a cluster IP from the upper half of 10.97.0.0/16; tests choose only lower addresses.
fn allocate_cluster_ip(store: &Store, key: &Key) -> Result<String, Failure> {
    let used: Vec<&str> =
        store.current(key.resource).filter_map(|service| service["spec"]["clusterIP"].as_str()).collect();
    let free = (0x8001..0xffff_u32)
        .map(|host| Ipv4Addr::from(0x0a61_0000 | host).to_string())
        .find(|address| !used.contains(&address.as_str()));
    free.ok_or_else(|| Failure::new(500, "InternalError", "range is full"))
}

fn set(object: &mut Value, field: &str, value: Option<&Value>) {
    match (value, object.as_object_mut()) {
        (Some(value), Some(fields)) => drop(fields.insert(field.to_owned(), value.clone())),
        (None, Some(fields)) => drop(fields.remove(field)),
        (_, None) => {}
    }
}

pub(super) fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The current time in seconds precision, as in object metadata.
pub(super) fn now() -> String {
    let seconds = Timestamp::now().as_second();
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

fn uuid() -> Result<String, Failure> {
    let read = fs::read_to_string("/proc/sys/kernel/random/uuid");
    let text = read
        .map_err(|error| Failure::new(500, "InternalError", format!("cannot read a random UUID: {error}")))?;
    Ok(text.trim().to_owned())
}
