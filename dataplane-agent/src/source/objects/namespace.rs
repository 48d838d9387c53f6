//! Converts v1 Namespace: labels and defaults for the pods in it.

use k8s_openapi::api::core::v1 as core;

use super::{Converted, FieldError};
use crate::state::{Namespace, Object};

pub(super) fn convert(mut namespace: core::Namespace) -> Result<Converted, FieldError> {
    let namespace = Namespace {
        name: super::name(&namespace.metadata)?,
        owner: super::owner(&namespace.metadata),
        labels: namespace.metadata.labels.take().unwrap_or_default(),
        annotations: super::annotations(&mut namespace.metadata, &[]),
    };
    Ok(Converted { object: Some(Object::Namespace(namespace)), problems: Vec::new() })
}
