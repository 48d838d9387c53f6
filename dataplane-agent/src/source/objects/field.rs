//! Fields: what one can hold, and the error that names it.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

use crate::state::TransportProtocol;

/// Longest name of an object.
const NAME_MAX: usize = 253;

/// A field that cannot be as it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// Path of the field, as `spec.ports[0].port`.
    pub field: String,
    pub reason: String,
}

impl FieldError {
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    pub(super) fn missing(field: impl Into<String>) -> Self {
        Self::new(field, "missing")
    }
}

/// A DNS subdomain (RFC 1123): nothing that could be mistaken for something else where names are printed or joined.
pub(super) fn object_name(field: &str, text: &str) -> Result<String, FieldError> {
    if text.is_empty() {
        return Err(FieldError::missing(field));
    }
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let outside = |c: char| c == '-' || c == '.';
    if text.len() > NAME_MAX
        || !text.chars().all(inside)
        || text.starts_with(outside)
        || text.ends_with(outside)
    {
        return Err(FieldError::new(field, format!("{text:?} is not a name of an object")));
    }
    Ok(text.to_owned())
}

/// The address of a pod, node or service: one that a packet between hosts can have.
pub(super) fn address(field: impl Display, text: &str) -> Result<IpAddr, FieldError> {
    let refuse = |reason| Err(FieldError::new(field.to_string(), format!("{text:?} {reason}")));
    let Ok(address) = text.parse::<IpAddr>() else { return refuse("is not an IP address".to_owned()) };
    match impossible(address) {
        Some(reason) => refuse(reason),
        None => Ok(address),
    }
}

/// A range of pod addresses.
pub(super) fn cidr(field: impl Display, text: &str) -> Result<IpNet, FieldError> {
    let refuse = |reason| Err(FieldError::new(field.to_string(), format!("{text:?} {reason}")));
    let Ok(cidr) = text.parse::<IpNet>() else { return refuse("is not a CIDR".to_owned()) };
    if cidr.trunc() != cidr {
        return refuse(format!("has bits set after its prefix: {} is meant?", cidr.trunc()));
    }
    if cidr.prefix_len() == 0 {
        return refuse("is every address".to_owned());
    }
    match impossible(cidr.network()) {
        Some(reason) => refuse(reason),
        None => Ok(cidr),
    }
}

fn impossible(address: IpAddr) -> Option<String> {
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Some(format!("is an IPv4-mapped IPv6 address: {v4} is meant?"));
    }
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let kind = if address.is_unspecified() {
        "the unspecified address"
    } else if address.is_loopback() {
        "a loopback address"
    } else if address.is_multicast() {
        "a multicast address"
    } else if link_local {
        "a link-local address"
    } else if address == Ipv4Addr::BROADCAST {
        "the broadcast address"
    } else {
        return None;
    };
    Some(format!("is {kind}"))
}

pub(super) fn port(field: impl Display, number: i32) -> Result<u16, FieldError> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| FieldError::new(field.to_string(), format!("{number} is not a port (1 to 65535)")))
}

/// TCP where the manifest leaves it out.
pub(super) fn protocol(field: impl Display, text: Option<&str>) -> Result<TransportProtocol, FieldError> {
    match text {
        None | Some("TCP") => Ok(TransportProtocol::Tcp),
        Some("UDP") => Ok(TransportProtocol::Udp),
        Some("SCTP") => Ok(TransportProtocol::Sctp),
        Some(other) => {
            Err(FieldError::new(field.to_string(), format!("{other:?} is none of TCP, UDP, SCTP")))
        }
    }
}

/// At most one per family: the second of a family is refused.
pub(super) fn one_per_family<T>(
    field: &str,
    values: &[T],
    is_ipv4: impl Fn(&T) -> bool,
) -> Result<(), FieldError> {
    let ipv4 = values.iter().filter(|value| is_ipv4(value)).count();
    for (family, count) in [("IPv4", ipv4), ("IPv6", values.len() - ipv4)] {
        if count > 1 {
            return Err(FieldError::new(field, format!("{count} of {family}; one per family is possible")));
        }
    }
    Ok(())
}
