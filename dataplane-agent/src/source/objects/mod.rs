//! Converts Kubernetes objects to [`Object`]s, or names the invalid field.
//!
//! Pure, and shared by all sources. Validates single objects; conflicts between objects are in
//! [`conflicts`](super::conflicts).

mod endpoint_slice;
mod field;
mod namespace;
mod node;
mod pod;
mod service;
mod service_cidr;

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::Value;

pub use field::FieldError;

use crate::state::{NamespacedName, Object, ObjectKey, Owner};

/// Prefix of the agent's annotations.
const ANNOTATION_PREFIX: &str = "dataplane.local/";

/// Kinds the agent reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Node,
    Namespace,
    Service,
    EndpointSlice,
    Pod,
    /// Since Kubernetes 1.33.
    ServiceCidr,
}

/// The conversion of a valid object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// `None`: the agent does not use the object, such as a headless Service.
    pub object: Option<Object>,
    /// Parts that were ignored, and what does not work.
    pub problems: Vec<FieldError>,
}

impl Kind {
    pub const ALL: [Self; 6] =
        [Self::Node, Self::Namespace, Self::Service, Self::EndpointSlice, Self::Pod, Self::ServiceCidr];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Node | Self::Namespace | Self::Service | Self::Pod => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether supported API servers exist that do not have the kind.
    pub const fn is_recent(self) -> bool {
        matches!(self, Self::ServiceCidr)
    }

    /// The state key of an object of this kind.
    pub fn key(self, namespace: &str, name: &str) -> ObjectKey {
        let namespaced = || NamespacedName::new(namespace, name);
        match self {
            Self::Node => ObjectKey::Node(name.to_owned()),
            Self::Namespace => ObjectKey::Namespace(name.to_owned()),
            Self::Service => ObjectKey::Service(namespaced()),
            Self::EndpointSlice => ObjectKey::EndpointSlice(namespaced()),
            Self::Pod => ObjectKey::Pod(namespaced()),
            Self::ServiceCidr => ObjectKey::ServiceCidr(name.to_owned()),
        }
    }

    /// Converts an object of this kind.
    pub fn convert(self, value: Value) -> Result<Converted, FieldError> {
        match self {
            Self::Node => node::convert(&typed::<Node>(value)?),
            Self::Namespace => namespace::convert(typed::<Namespace>(value)?),
            Self::Service => service::convert(&typed::<Service>(value)?),
            Self::EndpointSlice => endpoint_slice::convert(&typed::<EndpointSlice>(value)?),
            Self::Pod => pod::convert(typed::<Pod>(value)?),
            Self::ServiceCidr => service_cidr::convert(&typed::<ServiceCIDR>(value)?),
        }
    }
}

fn typed<T: for<'de> serde::Deserialize<'de>>(value: Value) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        let reason = error.into_inner().to_string();
        // "." is serde's path of the object itself
        if field == "." { FieldError::new("object", reason) } else { FieldError::new(field, reason) }
    })
}

/// Namespace and name of an object; the namespace defaults to `default`, as in kubectl.
fn namespaced_name(metadata: &ObjectMeta) -> Result<NamespacedName, FieldError> {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    Ok(NamespacedName::new(field::object_name("metadata.namespace", namespace)?, name(metadata)?))
}

fn name(metadata: &ObjectMeta) -> Result<String, FieldError> {
    field::object_name("metadata.name", metadata.name.as_deref().unwrap_or_default())
}

/// Whether the object has one of these labels, with any value.
fn has_label(metadata: &ObjectMeta, names: &[&str]) -> bool {
    let labels = metadata.labels.as_ref();
    labels.is_some_and(|labels| names.iter().any(|name| labels.contains_key(*name)))
}

/// The agent's annotations, and the listed ones of other components.
fn annotations(metadata: &mut ObjectMeta, others: &[&str]) -> BTreeMap<String, String> {
    let mut annotations = metadata.annotations.take().unwrap_or_default();
    annotations.retain(|name, _| name.starts_with(ANNOTATION_PREFIX) || others.contains(&name.as_str()));
    annotations
}

fn owner(metadata: &ObjectMeta) -> Owner {
    Owner { uid: metadata.uid.as_deref().unwrap_or_default().into() }
}

#[cfg(test)]
mod tests;
