//! What a Kubernetes object means to the agent: [`Object`]s, validated, or the field that is impossible.
//!
//! Pure, and the same for every source. Owns the rules of single objects; those between objects are in
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

/// Annotations of ours.
const OURS: &str = "dataplane.local/";

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

/// What became of an object that is not impossible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// `None`: there is nothing to do for it (a headless service).
    pub object: Option<Object>,
    /// Parts that were left out, and what will not work.
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

    /// Whether API servers that are still in use do not have it.
    pub const fn is_recent(self) -> bool {
        matches!(self, Self::ServiceCidr)
    }

    /// Which object of the state one of this kind is.
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

    /// Reads an object of this kind.
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
        // serde's name for the object itself
        if field == "." { FieldError::new("object", reason) } else { FieldError::new(field, reason) }
    })
}

/// Name of an object that has a namespace; `default` where the manifest leaves it out, as kubectl does.
fn namespaced_name(metadata: &ObjectMeta) -> Result<NamespacedName, FieldError> {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    Ok(NamespacedName::new(field::object_name("metadata.namespace", namespace)?, name(metadata)?))
}

fn name(metadata: &ObjectMeta) -> Result<String, FieldError> {
    field::object_name("metadata.name", metadata.name.as_deref().unwrap_or_default())
}

/// Whether the object has one of these labels, whatever it says.
fn has_label(metadata: &ObjectMeta, names: &[&str]) -> bool {
    let labels = metadata.labels.as_ref();
    labels.is_some_and(|labels| names.iter().any(|name| labels.contains_key(*name)))
}

/// Annotations of ours, and those of others that mean something to us.
fn annotations(metadata: &mut ObjectMeta, others: &[&str]) -> BTreeMap<String, String> {
    let mut annotations = metadata.annotations.take().unwrap_or_default();
    annotations.retain(|name, _| name.starts_with(OURS) || others.contains(&name.as_str()));
    annotations
}

fn owner(metadata: &ObjectMeta) -> Owner {
    Owner { uid: metadata.uid.as_deref().unwrap_or_default().into() }
}

#[cfg(test)]
mod tests;
