//! Validation of field values, and the error that names the field.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

use crate::state::TransportProtocol;

/// Maximum length of an object name.
const NAME_MAX: usize = 253;

/// An invalid field.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// Path of the field, such as `spec.ports[0].port`.
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

/// Validates a DNS subdomain (RFC 1123), so that names are safe to print and join.
pub(super) fn object_name(field: &str, text: &str) -> Result<String, FieldError> {
    if text.is_empty() {
        return Err(FieldError::missing(field));
    }
    let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let is_separator = |c: char| c == '-' || c == '.';
    if text.len() > NAME_MAX
        || !text.chars().all(is_allowed)
        || text.starts_with(is_separator)
        || text.ends_with(is_separator)
    {
        return Err(FieldError::new(field, format!("{text:?} is not a valid object name")));
    }
    Ok(text.to_owned())
}

/// Parses the address of a pod, node or Service; rejects addresses that cannot be one.
pub(super) fn address(field: impl Display, text: &str) -> Result<IpAddr, FieldError> {
    let invalid = |reason| Err(FieldError::new(field.to_string(), format!("{text:?} {reason}")));
    let Ok(address) = text.parse::<IpAddr>() else { return invalid("is not an IP address".to_owned()) };
    match unusable_reason(address) {
        Some(reason) => invalid(reason),
        None => Ok(address),
    }
}

/// Parses a CIDR; rejects ranges that cannot hold pods or Services.
pub(super) fn cidr(field: impl Display, text: &str) -> Result<IpNet, FieldError> {
    let invalid = |reason| Err(FieldError::new(field.to_string(), format!("{text:?} {reason}")));
    let Ok(cidr) = text.parse::<IpNet>() else { return invalid("is not a CIDR".to_owned()) };
    if cidr.trunc() != cidr {
        return invalid(format!("has bits set after its prefix: did you mean {}?", cidr.trunc()));
    }
    if cidr.prefix_len() == 0 {
        return invalid("covers all addresses".to_owned());
    }
    match unusable_reason(cidr.network()) {
        Some(reason) => invalid(reason),
        None => Ok(cidr),
    }
}

fn unusable_reason(address: IpAddr) -> Option<String> {
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Some(format!("is an IPv4-mapped IPv6 address: did you mean {v4}?"));
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

/// Parses a protocol. The default is TCP.
pub(super) fn protocol(field: impl Display, text: Option<&str>) -> Result<TransportProtocol, FieldError> {
    match text {
        None | Some("TCP") => Ok(TransportProtocol::Tcp),
        Some("UDP") => Ok(TransportProtocol::Udp),
        Some("SCTP") => Ok(TransportProtocol::Sctp),
        Some(other) => {
            Err(FieldError::new(field.to_string(), format!("{other:?} is not one of TCP, UDP, SCTP")))
        }
    }
}

/// Rejects a second value of the same family.
pub(super) fn one_per_family<T>(
    field: &str,
    values: &[T],
    is_ipv4: impl Fn(&T) -> bool,
) -> Result<(), FieldError> {
    let ipv4 = values.iter().filter(|value| is_ipv4(value)).count();
    for (family, count) in [("IPv4", ipv4), ("IPv6", values.len() - ipv4)] {
        if count > 1 {
            return Err(FieldError::new(
                field,
                format!("{count} of {family}; at most one per family is allowed"),
            ));
        }
    }
    Ok(())
}
