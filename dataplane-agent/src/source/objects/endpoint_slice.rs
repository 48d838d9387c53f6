//! Converts discovery.k8s.io/v1 EndpointSlice.

use std::{fmt::Display, net::IpAddr, time::SystemTime};

use k8s_openapi::{api::discovery::v1 as discovery, jiff::Timestamp};

use super::{Converted, FieldError, field, service::UNMANAGED_LABELS};
use crate::state::{Endpoint, EndpointPort, EndpointSlice, Hints, Name, NamespacedName, Object};

/// Label that names the Service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Annotation: when the change that caused this version happened (RFC 3339).
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Address family of a slice.
#[derive(Clone, Copy)]
enum Family {
    Ipv4,
    Ipv6,
}

pub(super) fn convert(slice: &discovery::EndpointSlice) -> Result<Converted, FieldError> {
    let name = super::namespaced_name(&slice.metadata)?;
    if super::has_label(&slice.metadata, &UNMANAGED_LABELS) {
        return Ok(Converted::default());
    }
    let family = match slice.address_type.as_str() {
        "IPv4" => Family::Ipv4,
        "IPv6" => Family::Ipv6,
        "FQDN" => {
            let problem = FieldError::new("addressType", "FQDN slices are not supported: ignored");
            return Ok(Converted { object: None, problems: vec![problem] });
        }
        "" => return Err(FieldError::missing("addressType")),
        other => {
            return Err(FieldError::new("addressType", format!("{other:?} is not one of IPv4, IPv6, FQDN")));
        }
    };
    let mut problems = Vec::new();
    let slice = EndpointSlice {
        service: service(slice, &name)?,
        name,
        owner: super::owner(&slice.metadata),
        ports: ports(slice, &mut problems)?,
        endpoints: endpoints(slice, family)?,
        trigger_time: trigger_time(slice),
    };
    Ok(Converted { object: Some(Object::EndpointSlice(slice)), problems })
}

/// An unreadable time is ignored: it only serves latency metrics.
fn trigger_time(slice: &discovery::EndpointSlice) -> Option<SystemTime> {
    let text = slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

fn service(slice: &discovery::EndpointSlice, name: &NamespacedName) -> Result<NamespacedName, FieldError> {
    let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    let service = label.map(String::as_str).unwrap_or_default();
    let service = field::object_name(&format!("metadata.labels[{SERVICE_NAME}]"), service)?;
    Ok(NamespacedName::new(name.namespace.clone(), service))
}

fn ports(
    slice: &discovery::EndpointSlice,
    problems: &mut Vec<FieldError>,
) -> Result<Vec<EndpointPort>, FieldError> {
    let list = slice.ports.as_deref().unwrap_or_default();
    let mut ports: Vec<EndpointPort> = Vec::with_capacity(list.len());
    for (index, port) in list.iter().enumerate() {
        let at = format!("ports[{index}]");
        let name = port.name.as_deref().unwrap_or_default();
        let protocol = field::protocol(format_args!("{at}.protocol"), port.protocol.as_deref())?;
        let number = port.port.map(|number| field::port(format_args!("{at}.port"), number)).transpose()?;
        let Some(port) = number else {
            problems.push(FieldError::new(
                format!("{at}.port"),
                "missing, which means all ports: not supported, port ignored",
            ));
            continue;
        };
        if ports.iter().any(|earlier| earlier.name == name) {
            return Err(FieldError::new(
                format!("{at}.name"),
                format!("{name:?} is the name of an earlier port"),
            ));
        }
        ports.push(EndpointPort { name: name.into(), port, protocol });
    }
    Ok(ports)
}

fn endpoints(slice: &discovery::EndpointSlice, family: Family) -> Result<Vec<Endpoint>, FieldError> {
    let list = slice.endpoints.as_deref().unwrap_or_default();
    // exact capacity: a cluster may have a hundred thousand endpoints
    let mut endpoints = Vec::with_capacity(list.len());
    for (index, item) in list.iter().enumerate() {
        endpoints.push(endpoint(&format!("endpoints[{index}]"), item, family)?);
    }
    Ok(endpoints)
}

fn endpoint(at: &str, endpoint: &discovery::Endpoint, family: Family) -> Result<Endpoint, FieldError> {
    let Some(first) = endpoint.addresses.first() else {
        return Err(FieldError::missing(format!("{at}.addresses")));
    };
    let conditions = endpoint.conditions.as_ref();
    // unset conditions count as true, each on its own, as in kube-proxy
    let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
    Ok(Endpoint {
        // the API gives further addresses no meaning; kube-proxy ignores them too
        address: address(format_args!("{at}.addresses[0]"), first, family)?,
        ready,
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        node_name: endpoint.node_name.as_deref().map(Name::from),
        hints: hints(endpoint),
    })
}

fn hints(endpoint: &discovery::Endpoint) -> Option<Box<Hints>> {
    let api_hints = endpoint.hints.as_ref()?;
    let hints = Hints {
        nodes: api_hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect(),
        zones: api_hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect(),
    };
    (hints != Hints::default()).then(|| Box::new(hints))
}

fn address(field: impl Display, text: &str, family: Family) -> Result<IpAddr, FieldError> {
    let address = field::address(&field, text)?;
    match (family, address) {
        (Family::Ipv4, IpAddr::V4(_)) | (Family::Ipv6, IpAddr::V6(_)) => Ok(address),
        (Family::Ipv4, IpAddr::V6(_)) => {
            Err(FieldError::new(field.to_string(), format!("{text:?} is not IPv4 as addressType requires")))
        }
        (Family::Ipv6, IpAddr::V4(_)) => {
            Err(FieldError::new(field.to_string(), format!("{text:?} is not IPv6 as addressType requires")))
        }
    }
}
