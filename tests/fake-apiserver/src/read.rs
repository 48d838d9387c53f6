//! Get, and paginated list at one revision.

use serde_json::{Value, json};

use super::{
    failure::Failure,
    paths::Target,
    select::Selector,
    store::{Key, Store},
};

/// Parameters of a list.
#[derive(Clone, Debug, Default)]
pub(super) struct Options {
    pub(super) selector: Selector,
    pub(super) limit: usize,
    /// The `continue` token of the previous page.
    pub(super) continue_token: String,
    pub(super) version: String,
    pub(super) version_match: String,
}

pub(super) fn get(store: &Store, target: &Target) -> Result<Value, Failure> {
    let name = target.name.clone().ok_or_else(Failure::no_such_path)?;
    let key = Key { resource: target.resource, namespace: target.namespace.clone(), name };
    match store.get(&key) {
        Some(object) => Ok((**object).clone()),
        None => Err(Failure::not_found(key.resource, &key.name)),
    }
}

pub(super) fn list(store: &Store, target: &Target, options: &Options) -> Result<Value, Failure> {
    let (revision, after) = start_of_list(store, options)?;
    let all = store.list(target.resource, revision).map_err(|failure| match failure.code {
        410 if !options.continue_token.is_empty() => Failure::expired_continue(),
        _ => failure,
    })?;
    let mut matching = all.into_iter().filter(|(key, object)| {
        (target.namespace.is_empty() || key.namespace == target.namespace)
            && after.as_ref().is_none_or(|after| (&key.namespace, &key.name) > (&after.0, &after.1))
            && options.selector.matches(object)
    });
    let limit = if options.limit == 0 { usize::MAX } else { options.limit };
    let mut last = None;
    let mut items = Vec::new();
    for (key, object) in matching.by_ref().take(limit) {
        last = Some(key);
        items.push((**object).clone());
    }
    let remaining = matching.count();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if let (Some(last), true) = (last, remaining > 0) {
        metadata["continue"] = json!(format!("{revision}/{}/{}", last.namespace, last.name));
        if options.selector.is_empty() {
            metadata["remainingItemCount"] = json!(remaining);
        }
    }
    Ok(json!({
        "apiVersion": target.resource.api_version(),
        "kind": format!("{}List", target.resource.kind),
        "metadata": metadata,
        "items": items,
    }))
}

/// Returns the revision to list, and the namespace and name that the page starts after.
fn start_of_list(store: &Store, options: &Options) -> Result<(u64, Option<(String, String)>), Failure> {
    if !options.continue_token.is_empty() {
        let parts: Vec<&str> = options.continue_token.split('/').collect();
        let [revision, namespace, name] = parts.as_slice() else {
            return Err(Failure::bad_request("continue key is not valid"));
        };
        let after = ((*namespace).to_owned(), (*name).to_owned());
        return Ok((parse_revision(revision)?, Some(after)));
    }
    let requested = parse_revision(&options.version)?;
    match options.version_match.as_str() {
        "Exact" if requested == 0 => Err(Failure::invalid_options(
            "resourceVersionMatch: Forbidden: resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
        )),
        "Exact" => Ok((requested, None)),
        "" | "NotOlderThan" if requested > store.revision() => {
            Err(Failure::too_large(requested, store.revision()))
        }
        "NotOlderThan" if options.version.is_empty() => Err(Failure::invalid_options(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
        )),
        "" | "NotOlderThan" => Ok((store.revision(), None)),
        other => Err(Failure::invalid_options(&format!(
            "resourceVersionMatch: Unsupported value: \"{other}\": supported values: \"Exact\", \"NotOlderThan\""
        ))),
    }
}

/// Parses a revision; empty: 0.
pub(super) fn parse_revision(version: &str) -> Result<u64, Failure> {
    if version.is_empty() {
        return Ok(0);
    }
    version.parse().map_err(|_no_number| {
        Failure::invalid_options(&format!("resourceVersion: Invalid value: \"{version}\": strconv.ParseUint"))
    })
}
