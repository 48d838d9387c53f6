//! Annotations of a pod that the agent reads. Pure.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

/// Annotations that request an address of the pod, one per family.
pub const IPV4: &str = "dataplane.local/ipv4";
pub const IPV6: &str = "dataplane.local/ipv6";
/// Annotation that lists the sources of other machines for which the pod routes.
pub const ALLOWED_SOURCES: &str = "dataplane.local/allowed-sources";

/// Most prefixes of one pod: the pods of a node share one table.
const MAX_ALLOWED_SOURCES: usize = 32;
/// Networks whose addresses no packet may have as its source, whatever a pod is allowed.
const NEVER_SOURCES: [(&str, &str); 7] = [
    ("0.0.0.0/8", "this network"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/3", "multicast or reserved"),
    ("::/127", "unspecified or loopback"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// What a pod requests by annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodAnnotations {
    /// Requested addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// Sources that the pod may use besides its own addresses.
    pub allowed_sources: Vec<IpNet>,
}

/// An annotation that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    #[error("annotation {annotation}: {value:?} is not an {family} address")]
    Address { annotation: &'static str, value: String, family: &'static str },
    #[error("annotation {ALLOWED_SOURCES}: {value:?} is not a CIDR such as 10.9.0.0/16 or fd00:9::/64")]
    NotCidr { value: String },
    #[error("annotation {ALLOWED_SOURCES}: {cidr} has host bits set; did you mean {}?", cidr.trunc())]
    HostBits { cidr: IpNet },
    #[error("annotation {ALLOWED_SOURCES}: {cidr} is never allowed as a source ({kind})")]
    NeverSource { cidr: IpNet, kind: &'static str },
    #[error("annotation {ALLOWED_SOURCES}: {count} CIDRs, at most {MAX_ALLOWED_SOURCES} are possible")]
    TooMany { count: usize },
    #[error(
        "annotation {ALLOWED_SOURCES} is not allowed in namespace {namespace}; to allow it, add the namespace to \
         allowed_sources_namespaces in the agent's configuration"
    )]
    Namespace { namespace: String },
}

/// Reads the annotations of a pod. Only pods in `allowed_sources_namespaces` may have
/// [`ALLOWED_SOURCES`].
pub fn read(
    annotations: &BTreeMap<String, String>,
    namespace: &str,
    allowed_sources_namespaces: &[String],
) -> Result<PodAnnotations, AnnotationError> {
    let mut addresses = Vec::new();
    for (annotation, family) in [(IPV4, "IPv4"), (IPV6, "IPv6")] {
        let Some(value) = annotations.get(annotation) else { continue };
        match value.trim().parse::<IpAddr>() {
            Ok(address) if address.is_ipv4() == (annotation == IPV4) => addresses.push(address),
            _ => return Err(AnnotationError::Address { annotation, value: value.clone(), family }),
        }
    }
    let allowed_sources = match annotations.get(ALLOWED_SOURCES) {
        None => Vec::new(),
        Some(_) if !allowed_sources_namespaces.iter().any(|listed| listed == namespace) => {
            return Err(AnnotationError::Namespace { namespace: namespace.to_owned() });
        }
        Some(value) => sources(value)?,
    };
    Ok(PodAnnotations { addresses, allowed_sources })
}

/// Reads CIDRs separated by commas: sorted, each once. An empty value is an empty list.
fn sources(value: &str) -> Result<Vec<IpNet>, AnnotationError> {
    if value.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut sources = value.split(',').map(|cidr| source(cidr.trim())).collect::<Result<Vec<_>, _>>()?;
    sources.sort_unstable();
    sources.dedup();
    if sources.len() > MAX_ALLOWED_SOURCES {
        return Err(AnnotationError::TooMany { count: sources.len() });
    }
    Ok(sources)
}

fn source(value: &str) -> Result<IpNet, AnnotationError> {
    let Ok(cidr) = value.parse::<IpNet>() else {
        return Err(AnnotationError::NotCidr { value: value.to_owned() });
    };
    if cidr.trunc() != cidr {
        return Err(AnnotationError::HostBits { cidr });
    }
    if let IpNet::V6(v6) = cidr
        && v6.prefix_len() >= 96
        && v6.network().to_ipv4_mapped().is_some()
    {
        return Err(AnnotationError::NeverSource { cidr, kind: "IPv4-mapped" });
    }
    // a larger network, such as 0.0.0.0/0, is allowed: the datapath still refuses these addresses
    let within = |network: &str| network.parse::<IpNet>().is_ok_and(|network| network.contains(&cidr));
    match NEVER_SOURCES.iter().find(|(network, _)| within(network)) {
        Some((_, kind)) => Err(AnnotationError::NeverSource { cidr, kind }),
        None => Ok(cidr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_in(namespace: &str, annotations: &[(&str, &str)]) -> Result<PodAnnotations, String> {
        let annotations =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        read(&annotations, namespace, &["vpn".to_owned()]).map_err(|error| error.to_string())
    }

    fn addresses(annotations: &[(&str, &str)]) -> Result<Vec<String>, String> {
        Ok(read_in("shop", annotations)?.addresses.iter().map(ToString::to_string).collect())
    }

    fn sources(value: &str) -> Result<Vec<String>, String> {
        let annotations = read_in("vpn", &[(ALLOWED_SOURCES, value)])?;
        Ok(annotations.allowed_sources.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn annotations_request_one_address_per_family() {
        assert_eq!(addresses(&[]).unwrap(), [""; 0]);
        assert_eq!(
            addresses(&[(IPV6, "fd00::7"), (IPV4, " 10.1.0.7"), ("other", "x")]).unwrap(),
            ["10.1.0.7", "fd00::7"]
        );
        let error = addresses(&[(IPV4, "fd00::7")]).unwrap_err();
        assert_eq!(error, "annotation dataplane.local/ipv4: \"fd00::7\" is not an IPv4 address");
    }

    #[test]
    fn allowed_sources_are_cidrs_of_both_families() {
        assert_eq!(sources("").unwrap(), [""; 0]);
        assert_eq!(
            sources(" fd00:9::/64,10.9.0.0/16 , 10.9.0.0/16,192.0.2.7/32").unwrap(),
            ["10.9.0.0/16", "192.0.2.7/32", "fd00:9::/64"]
        );
        // the datapath refuses loopback and others one by one
        assert_eq!(sources("0.0.0.0/0, ::/0").unwrap(), ["0.0.0.0/0", "::/0"]);
    }

    #[test]
    fn invalid_allowed_source_is_refused_with_the_reason() {
        let many: Vec<_> = (0..=MAX_ALLOWED_SOURCES).map(|n| format!("10.9.{n}.0/24")).collect();
        for (value, reason) in [
            ("10.9.0.0", "\"10.9.0.0\" is not a CIDR such as 10.9.0.0/16 or fd00:9::/64"),
            ("10.9.0.0/16,", "\"\" is not a CIDR"),
            ("10.9.0.1/16", "10.9.0.1/16 has host bits set; did you mean 10.9.0.0/16?"),
            ("127.0.0.0/8", "127.0.0.0/8 is never allowed as a source (loopback)"),
            ("169.254.7.0/24", "never allowed as a source (link-local)"),
            ("239.0.0.0/8", "never allowed as a source (multicast or reserved)"),
            ("0.0.0.0/32", "never allowed as a source (this network)"),
            ("::1/128", "never allowed as a source (unspecified or loopback)"),
            ("fe80::/64", "never allowed as a source (link-local)"),
            ("ff02::/16", "never allowed as a source (multicast)"),
            ("::ffff:10.9.0.0/112", "never allowed as a source (IPv4-mapped)"),
            (&many.join(","), "33 CIDRs, at most 32 are possible"),
        ] {
            let error = sources(value).unwrap_err();
            let rest = error.strip_prefix("annotation dataplane.local/allowed-sources: ");
            assert!(rest.is_some_and(|rest| rest.contains(reason)), "{value}: {error}");
        }
    }

    #[test]
    fn allowed_sources_are_refused_outside_of_the_listed_namespaces() {
        assert_eq!(
            read_in("shop", &[(ALLOWED_SOURCES, "10.9.0.0/16")]).unwrap_err(),
            "annotation dataplane.local/allowed-sources is not allowed in namespace shop; to allow it, add the \
             namespace to allowed_sources_namespaces in the agent's configuration"
        );
    }
}
