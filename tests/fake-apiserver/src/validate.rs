//! Validation of immutable fields and field values, with the messages of the real API server.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde_json::Value;

use super::{admission::text, failure::Failure, store::Key};

/// Rejects objects as the real API server does, as far as tests rely on it.
pub(super) fn validate(key: &Key, object: &Value, old: Option<&Value>) -> Result<(), Failure> {
    let reject = |problem: String| Err(Failure::invalid(key.resource, &key.name, &problem));
    match key.resource.kind {
        "Node" => match node_problem(object, old) {
            Some(problem) => reject(problem),
            None => Ok(()),
        },
        "Service" => {
            let (is, was) = (&object["spec"]["clusterIP"], old.map(|old| &old["spec"]["clusterIP"]));
            match was {
                Some(was) if was.is_string() && is.is_string() && was != is => {
                    reject(format!("spec.clusterIPs[0]: Invalid value: [{is}]: may not change once set"))
                }
                _ => Ok(()),
            }
        }
        "EndpointSlice" => match slice_problem(object, old) {
            Some(problem) => reject(problem),
            None => Ok(()),
        },
        "Event" => match event_problem(key, object, old) {
            Some(problem) => reject(problem),
            None => Ok(()),
        },
        "Lease" if object["spec"]["leaseDurationSeconds"].as_i64().is_some_and(|seconds| seconds <= 0) => {
            reject("spec.leaseDurationSeconds: Invalid value: must be greater than 0".to_owned())
        }
        _ => Ok(()),
    }
}

fn node_problem(node: &Value, old: Option<&Value>) -> Option<String> {
    let cidrs = |node: &Value| -> Vec<String> {
        let all = node["spec"]["podCIDRs"].as_array();
        all.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let (now, before) = (cidrs(node), old.map(cidrs).unwrap_or_default());
    if !before.is_empty() && before != now {
        return Some(
            "spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \"\" to valid"
                .to_owned(),
        );
    }
    let mut parsed = Vec::new();
    for (index, cidr) in now.iter().enumerate() {
        match cidr.parse::<IpNet>() {
            Ok(net) => parsed.push(net),
            Err(_) => {
                return Some(format!(
                    "spec.podCIDRs[{index}]: Invalid value: \"{cidr}\": must be a valid CIDR value, (e.g. 10.9.8.0/24 \
                     or 2001:db8::/64)"
                ));
            }
        }
    }
    let v4 = parsed.iter().filter(|net| matches!(net, IpNet::V4(_))).count();
    if v4 > 1 || parsed.len() - v4 > 1 {
        return Some(format!(
            "spec.podCIDRs: Invalid value: {now:?}: may specify no more than one CIDR for each IP family"
        ));
    }
    let addresses: Vec<&Value> = node["status"]["addresses"].as_array().into_iter().flatten().collect();
    let repeated = addresses
        .iter()
        .enumerate()
        .find(|(at, address)| addresses.iter().take(*at).any(|one| one == *address));
    repeated.map(|(at, address)| format!("status.addresses[{at}]: Duplicate value: {address}"))
}

fn slice_problem(slice: &Value, old: Option<&Value>) -> Option<String> {
    let kind = text(slice, "addressType");
    if old.is_some_and(|old| text(old, "addressType") != kind) {
        return Some(format!("addressType: Invalid value: \"{kind}\": field is immutable"));
    }
    if !["IPv4", "IPv6", "FQDN"].contains(&kind) {
        return Some(format!(
            "addressType: Unsupported value: \"{kind}\": supported values: \"FQDN\", \"IPv4\", \"IPv6\""
        ));
    }
    let endpoints = slice["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
    if endpoints.len() > 1_000 {
        return Some(format!("endpoints: Too many: {}: must have at most 1000 items", endpoints.len()));
    }
    for (number, endpoint) in endpoints.iter().enumerate() {
        let addresses = endpoint["addresses"].as_array().map_or(&[][..], Vec::as_slice);
        if addresses.is_empty() {
            return Some(format!(
                "endpoints[{number}].addresses: Required value: must contain at least 1 address"
            ));
        }
        for (at, address) in addresses.iter().filter_map(Value::as_str).enumerate() {
            let is_valid = match kind {
                "IPv4" => address.parse::<Ipv4Addr>().is_ok(),
                "IPv6" => address.parse::<Ipv6Addr>().is_ok(),
                _ => true,
            };
            if !is_valid {
                return Some(format!(
                    "endpoints[{number}].addresses[{at}]: Invalid value: \"{address}\": must be a valid {kind} address"
                ));
            }
        }
    }
    None
}

/// Events about cluster-scoped objects are in `default`; with an `eventTime` also in `kube-system`.
fn event_problem(key: &Key, event: &Value, old: Option<&Value>) -> Option<String> {
    let is_new = key.resource.group == "events.k8s.io";
    let about = &event[if is_new { "regarding" } else { "involvedObject" }];
    let of = text(about, "namespace");
    let is_namespace_valid = match (of, key.namespace.as_str()) {
        ("", "default") => true,
        ("", "kube-system") => !text(event, "eventTime").is_empty(),
        (of, namespace) => of == namespace,
    };
    if !is_namespace_valid {
        return Some(format!(
            "involvedObject.namespace: Invalid value: \"{of}\": does not match event.namespace"
        ));
    }
    if !is_new {
        return None;
    }
    if let Some(old) = old {
        let fixed = ["eventTime", "reason", "note", "type", "action", "regarding", "reportingController"];
        let changed = fixed.iter().find(|field| old.get(field) != event.get(field));
        return changed.map(|field| format!("{field}: Invalid value: field is immutable"));
    }
    for field in ["eventTime", "reportingController", "reportingInstance", "action", "reason"] {
        let value = text(event, field);
        if value.is_empty() {
            return Some(format!("{field}: Required value"));
        }
        if value.len() > 128 {
            return Some(format!("{field}: Invalid value: \"{value}\": can have at most 128 characters"));
        }
    }
    if text(event, "note").len() > 1_024 {
        return Some("message: Invalid value: can have at most 1024 characters".to_owned());
    }
    let kind = text(event, "type");
    if !["Normal", "Warning"].contains(&kind) {
        return Some(format!("type: Invalid value: \"{kind}\": has invalid value: \"{kind}\""));
    }
    None
}
