//! Parsers of configuration values, shared by flags, variables and the file.

use std::{fmt::Display, net::SocketAddr, ops::RangeInclusive, path::PathBuf, str::FromStr};

use http::Uri;
use ipnet::IpNet;
use tracing_subscriber::EnvFilter;

use super::NodePortAddresses;

/// Longest name of a network device: `IFNAMSIZ` less its NUL.
const DEVICE_NAME_MAX: usize = 15;
/// Longest name of a namespace (RFC 1123 label).
const NAMESPACE_NAME_MAX: usize = 63;
/// Longest name of a Kubernetes object (RFC 1123 subdomain).
const OBJECT_NAME_MAX: usize = 253;
/// Minimum link MTU of IPv6 (RFC 8200 §5).
const MTU_MIN: u32 = 1_280;
const MTU_MAX: u32 = 65_535;
/// 16 million rows of the smallest table take more than a gigabyte: a typing error.
const CAPACITY_MAX: u32 = 1 << 24;
/// The kernel requires ring buffer sizes that are powers of two and multiples of a page.
const EVENTS_BYTES: RangeInclusive<u32> = 1 << 12..=1 << 28;

/// An invalid value; the text says what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

/// A path; `None`: auto.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupPath(pub Option<PathBuf>);

/// A path; `None`: the pod's service account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeconfigPath(pub Option<PathBuf>);

/// URLs of API servers; may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Servers(pub Vec<Uri>);

/// An MTU; `None`: auto.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mtu(pub Option<u32>);

/// CIDRs; may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cidrs(pub Vec<IpNet>);

/// Names of namespaces; may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces(pub Vec<String>);

/// A listen address; `None`: off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http(pub Option<SocketAddr>);

impl Default for Http {
    fn default() -> Self {
        Self(Some(SocketAddr::from(([127, 0, 0, 1], 9_964))))
    }
}

impl Invalid {
    pub(super) fn new(must: impl Into<String>) -> Self {
        Self(must.into())
    }
}

/// Parses a type whose `FromStr` error is the message.
pub(super) fn from_str<T: FromStr<Err: Display>>(text: &str) -> Result<T, Invalid> {
    text.parse().map_err(|error: T::Err| Invalid(error.to_string()))
}

pub(super) fn flag(text: &str) -> Result<bool, Invalid> {
    text.parse().map_err(|_not_bool| Invalid::new("must be true or false"))
}

pub(super) fn node_name(text: &str) -> Result<String, Invalid> {
    if text.len() <= OBJECT_NAME_MAX && text.split('.').all(is_label) {
        return Ok(text.to_owned());
    }
    Err(Invalid::new("must be the name of a Node: lower-case letters, digits, - and ., up to 253 characters"))
}

fn is_label(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    ends(text.chars().next())
        && ends(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

pub(super) fn namespaces(text: &str) -> Result<Namespaces, Invalid> {
    if text.is_empty() {
        return Ok(Namespaces::default());
    }
    let name = |text: &str| {
        let text = text.trim();
        if text.len() <= NAMESPACE_NAME_MAX && is_label(text) {
            return Ok(text.to_owned());
        }
        Err(Invalid::new(format!("{text:?} is not the name of a namespace: patterns are not possible")))
    };
    text.split(',').map(name).collect::<Result<_, _>>().map(Namespaces)
}

pub(super) fn path(text: &str) -> Result<PathBuf, Invalid> {
    if text.is_empty() {
        return Err(Invalid::new("must be a path"));
    }
    Ok(text.into())
}

pub(super) fn cgroup(text: &str) -> Result<CgroupPath, Invalid> {
    if text == "auto" {
        return Ok(CgroupPath(None));
    }
    path(text).map(|path| CgroupPath(Some(path)))
}

pub(super) fn kubeconfig(text: &str) -> Result<KubeconfigPath, Invalid> {
    if text == "auto" {
        return Ok(KubeconfigPath(None));
    }
    path(text).map(|path| KubeconfigPath(Some(path)))
}

pub(super) fn servers(text: &str) -> Result<Servers, Invalid> {
    if text.is_empty() {
        return Ok(Servers::default());
    }
    let mut servers = Vec::new();
    for url in text.split(',').map(|text| server(text.trim())) {
        let url = url?;
        if servers.contains(&url) {
            return Err(Invalid::new(format!("{url} is listed twice")));
        }
        servers.push(url);
    }
    Ok(Servers(servers))
}

fn server(text: &str) -> Result<Uri, Invalid> {
    let url = text.parse::<Uri>().ok().filter(|url| {
        let authority = url.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        matches!(url.scheme_str(), Some("https" | "http"))
            && url.host().is_some_and(|host| !host.is_empty())
            && !authority.contains('@')
            && (authority.ends_with(url.host().unwrap_or_default())
                || url.port_u16().is_some_and(|port| port > 0))
            && url.query().is_none()
    });
    url.ok_or_else(|| Invalid::new(format!("{text:?} is not a server URL such as https://10.0.0.1:6443")))
}

pub(super) fn device(text: &str) -> Result<String, Invalid> {
    let refused = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if text.is_empty() || text.len() > DEVICE_NAME_MAX || text.contains(refused) || matches!(text, "." | "..")
    {
        return Err(Invalid::new(
            "must be the name of a network device: 1 to 15 characters, no /, : or space",
        ));
    }
    Ok(text.to_owned())
}

pub(super) fn vni(text: &str) -> Result<u32, Invalid> {
    within(text, 1..=(1 << 24) - 1)
}

pub(super) fn port(text: &str) -> Result<u16, Invalid> {
    within(text, 1..=u16::MAX)
}

pub(super) fn mtu(text: &str) -> Result<Mtu, Invalid> {
    if text == "auto" {
        return Ok(Mtu(None));
    }
    within(text, MTU_MIN..=MTU_MAX)
        .map(|mtu| Mtu(Some(mtu)))
        .map_err(|_range| Invalid::new(format!("must be auto or {MTU_MIN} to {MTU_MAX}")))
}

/// Bits of a mark: hexadecimal with the prefix `0x`, or decimal, as YAML passes numbers on.
pub(super) fn mark(text: &str) -> Result<u32, Invalid> {
    let bits = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    bits.ok()
        .filter(|bits| *bits != 0)
        .ok_or_else(|| Invalid::new("must be the bits of a packet mark, such as 0x1000, and not 0"))
}

pub(super) fn cidrs(text: &str) -> Result<Cidrs, Invalid> {
    if text.is_empty() {
        return Ok(Cidrs::default());
    }
    text.split(',').map(cidr).collect::<Result<_, _>>().map(Cidrs)
}

pub(super) fn node_ports(text: &str) -> Result<NodePortAddresses, Invalid> {
    match text {
        "all" => Ok(NodePortAddresses::All),
        "primary" => Ok(NodePortAddresses::Primary),
        _ => cidrs(text).map(|ranges| NodePortAddresses::Within(ranges.0)),
    }
}

fn cidr(text: &str) -> Result<IpNet, Invalid> {
    let Ok(cidr) = text.trim().parse::<IpNet>() else {
        return Err(Invalid::new(format!("{text:?} is not a CIDR such as 10.0.0.0/8 or fd00::/8")));
    };
    if cidr.trunc() != cidr {
        return Err(Invalid::new(format!("{text} has host bits set; did you mean {}?", cidr.trunc())));
    }
    if let IpNet::V6(v6) = cidr
        && let (Some(ipv4), Some(bits)) = (v6.network().to_ipv4_mapped(), v6.prefix_len().checked_sub(96))
    {
        return Err(Invalid::new(format!("{text} is IPv4-mapped; did you mean {ipv4}/{bits}?")));
    }
    Ok(cidr)
}

/// Ports below 1024 are refused: servers of the node bind them.
pub(super) fn ports(text: &str) -> Result<RangeInclusive<u16>, Invalid> {
    let range = text
        .split_once('-')
        .and_then(|(first, last)| Some(first.trim().parse::<u16>().ok()?..=last.trim().parse::<u16>().ok()?));
    range
        .filter(|range| !range.is_empty() && *range.start() >= 1_024)
        .ok_or_else(|| Invalid::new("must be FIRST-LAST within 1024-65535"))
}

pub(super) fn capacity(text: &str) -> Result<u32, Invalid> {
    within(text, 1..=CAPACITY_MAX)
}

pub(super) fn events_bytes(text: &str) -> Result<u32, Invalid> {
    text.parse::<u32>()
        .ok()
        .filter(|bytes| EVENTS_BYTES.contains(bytes) && bytes.is_power_of_two())
        .ok_or_else(|| {
            Invalid::new(format!(
                "must be a power of two from {} to {}",
                EVENTS_BYTES.start(),
                EVENTS_BYTES.end()
            ))
        })
}

pub(super) fn http(text: &str) -> Result<Http, Invalid> {
    if text == "off" {
        return Ok(Http(None));
    }
    text.parse()
        .map(|at| Http(Some(at)))
        .map_err(|_address| Invalid::new("must be off, or ADDRESS:PORT such as 127.0.0.1:9964 or [::1]:9964"))
}

pub(super) fn log(text: &str) -> Result<String, Invalid> {
    EnvFilter::try_new(text).map(|_filter| text.to_owned()).map_err(|error| {
        Invalid(format!("must be a filter such as info or dataplane_agent=debug,info: {error}"))
    })
}

fn within<N: FromStr + PartialOrd + Display>(text: &str, range: RangeInclusive<N>) -> Result<N, Invalid> {
    text.parse()
        .ok()
        .filter(|n| range.contains(n))
        .ok_or_else(|| Invalid::new(format!("must be {} to {}", range.start(), range.end())))
}
