//! What a Kubernetes object means to the agent: [`Object`]s, validated, or the field that is impossible.
//!
//! Pure, and the same for every source. Owns the rules of single objects; those between objects are in
//! [`conflicts`](super::conflicts).

mod endpoint_slice;
mod field;
mod node;
mod service;

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::Value;

pub use field::FieldError;

use crate::state::{NamespacedName, Object, ObjectKey, Owner};

/// Kinds the agent reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Node,
    Service,
    EndpointSlice,
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
    pub const ALL: [Self; 3] = [Self::Node, Self::Service, Self::EndpointSlice];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
        }
    }

    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Node | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Which object of the state one of this kind is.
    pub fn key(self, namespace: &str, name: &str) -> ObjectKey {
        let namespaced = || NamespacedName { namespace: namespace.to_owned(), name: name.to_owned() };
        match self {
            Self::Node => ObjectKey::Node(name.to_owned()),
            Self::Service => ObjectKey::Service(namespaced()),
            Self::EndpointSlice => ObjectKey::EndpointSlice(namespaced()),
        }
    }

    /// Reads an object of this kind.
    pub fn convert(self, value: Value) -> Result<Converted, FieldError> {
        match self {
            Self::Node => node::convert(&typed::<Node>(value)?),
            Self::Service => service::convert(&typed::<Service>(value)?),
            Self::EndpointSlice => endpoint_slice::convert(&typed::<EndpointSlice>(value)?),
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
    Ok(NamespacedName {
        namespace: field::object_name("metadata.namespace", namespace)?,
        name: name(metadata)?,
    })
}

fn name(metadata: &ObjectMeta) -> Result<String, FieldError> {
    field::object_name("metadata.name", metadata.name.as_deref().unwrap_or_default())
}

fn owner(metadata: &ObjectMeta) -> Owner {
    Owner {
        uid: metadata.uid.clone().unwrap_or_default(),
        resource_version: metadata.resource_version.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests;
