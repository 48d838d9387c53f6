//! Create, update, patch, delete.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    admission::{self, text},
    failure::Failure,
    patch,
    paths::Target,
    store::{Key, Store},
};

/// Creates an object.
pub(super) fn create(store: &mut Store, target: &Target, object: &Value) -> Result<Arc<Value>, Failure> {
    let (key, object) = admission::create(store, target.resource, &target.namespace, object)?;
    if store.get(&key).is_some() {
        return Err(Failure::already_exists(key.resource, &key.name));
    }
    Ok(store.put(&key, object))
}

/// Updates an object. Returns it, and whether it was created.
pub(super) fn update(
    store: &mut Store,
    target: &Target,
    object: &Value,
) -> Result<(Arc<Value>, bool), Failure> {
    let key = key_of(target)?;
    let version = text(&object["metadata"], "resourceVersion");
    let Some(old) = store.get(&key).cloned() else {
        if target.resource.create_on_update && version.is_empty() {
            return Ok((create(store, target, object)?, true));
        }
        return Err(Failure::not_found(key.resource, &key.name));
    };
    if version.is_empty() && !target.resource.unconditional {
        let problem = "metadata.resourceVersion: Invalid value: 0: must be specified for an update";
        return Err(Failure::invalid(key.resource, &key.name, problem));
    }
    Ok((replace(store, target, &key, &old, object)?, false))
}

/// Patches an object.
pub(super) fn patch(
    store: &mut Store,
    target: &Target,
    content_type: &str,
    change: &Value,
) -> Result<Arc<Value>, Failure> {
    let key = key_of(target)?;
    let old = store.get(&key).cloned().ok_or_else(|| Failure::not_found(key.resource, &key.name))?;
    let new = patch::apply(content_type, key.resource.kind, &old, change)?;
    replace(store, target, &key, &old, &new)
}

fn replace(
    store: &mut Store,
    target: &Target,
    key: &Key,
    old: &Arc<Value>,
    object: &Value,
) -> Result<Arc<Value>, Failure> {
    let version = text(&object["metadata"], "resourceVersion");
    if !version.is_empty() && old["metadata"]["resourceVersion"] != version {
        return Err(Failure::modified(key.resource, &key.name));
    }
    let mut new = admission::update(store, key, old, object, target.subresource)?;
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
    if is_terminating(&new) && finalizers(&new) == 0 {
        return store.delete(key).ok_or_else(|| Failure::not_found(key.resource, &key.name));
    }
    // an update without a change writes nothing
    if new == **old {
        return Ok(Arc::clone(old));
    }
    Ok(store.put(key, new))
}

/// Deletes an object; one with finalizers gets a deletion timestamp.
pub(super) fn delete(store: &mut Store, target: &Target, options: &Value) -> Result<Arc<Value>, Failure> {
    let key = key_of(target)?;
    let old = store.get(&key).cloned().ok_or_else(|| Failure::not_found(key.resource, &key.name))?;
    for field in ["uid", "resourceVersion"] {
        let wanted = text(&options["preconditions"], field);
        let is = text(&old["metadata"], field);
        if !wanted.is_empty() && wanted != is {
            let problem = format!(
                "Precondition failed: {field} in precondition: {wanted}, {field} in object meta: {is}"
            );
            return Err(Failure::conflict(key.resource, &key.name, &problem));
        }
    }
    if finalizers(&old) == 0 {
        return store.delete(&key).ok_or_else(|| Failure::not_found(key.resource, &key.name));
    }
    if is_terminating(&old) {
        return Ok(old);
    }
    let mut terminating = (*old).clone();
    terminating["metadata"]["deletionTimestamp"] = json!(admission::now());
    terminating["metadata"]["deletionGracePeriodSeconds"] = json!(0);
    Ok(store.put(&key, terminating))
}

fn key_of(target: &Target) -> Result<Key, Failure> {
    let name = target.name.clone().ok_or_else(Failure::no_such_path)?;
    Ok(Key { resource: target.resource, namespace: target.namespace.clone(), name })
}

fn is_terminating(object: &Value) -> bool {
    object["metadata"].get("deletionTimestamp").is_some()
}

fn finalizers(object: &Value) -> usize {
    object["metadata"]["finalizers"].as_array().map_or(0, Vec::len)
}
