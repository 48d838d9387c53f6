//! Annotations of a pod that the agent reads. Pure.

use std::{collections::BTreeMap, net::IpAddr};

/// Annotations that request an address of the pod, one per family.
pub const IPV4: &str = "dataplane.local/ipv4";
pub const IPV6: &str = "dataplane.local/ipv6";

/// What a pod requests by annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodAnnotations {
    /// Requested addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
}

/// An annotation with an invalid value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {annotation}: {value:?} is not an {family} address")]
pub struct AnnotationError {
    pub annotation: &'static str,
    pub value: String,
    pub family: &'static str,
}

/// Reads the annotations of a pod.
pub fn read(annotations: &BTreeMap<String, String>) -> Result<PodAnnotations, AnnotationError> {
    let mut addresses = Vec::new();
    for (annotation, family) in [(IPV4, "IPv4"), (IPV6, "IPv6")] {
        let Some(value) = annotations.get(annotation) else { continue };
        match value.trim().parse::<IpAddr>() {
            Ok(address) if address.is_ipv4() == (annotation == IPV4) => addresses.push(address),
            _ => return Err(AnnotationError { annotation, value: value.clone(), family }),
        }
    }
    Ok(PodAnnotations { addresses })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(annotations: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let annotations =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let annotations = read(&annotations).map_err(|error| error.to_string())?;
        Ok(annotations.addresses.iter().map(ToString::to_string).collect())
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
}
