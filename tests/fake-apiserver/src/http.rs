//! HTTP: authenticates and authorizes requests, executes them, and injects faults into responses.

use std::{io, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{Query, Request, State as Shared},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::Response,
};
use futures::{Stream, StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    failure::Failure,
    faults::Fault,
    paths::Target,
    rbac::User,
    read, resources,
    select::Selector,
    state::State,
    watch::{self, Watch},
    write,
};

/// Largest request body in bytes, as in the real server.
const MAX_BODY: usize = 3 * 1024 * 1024;

/// Query parameters.
struct Parameters(Vec<(String, String)>);

/// Handles all requests.
pub(super) async fn handle(Shared(state): Shared<Arc<State>>, request: Request) -> Response {
    respond(&state, request).await.unwrap_or_else(|failure| error_response(&failure))
}

async fn respond(state: &Arc<State>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let authorization = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let user = state.access().authenticate(authorization)?;
    let path = parts.uri.path();
    if ["/readyz", "/livez", "/healthz"].contains(&path) {
        return Ok(response(200, "text/plain", Body::from("ok")));
    }
    if let Some(document) = resources::discovery(path) {
        return Ok(json_response(200, &document));
    }
    let parameters = Parameters::of(&parts.uri)?;
    let selector = Selector::parse(parameters.text("labelSelector"), parameters.text("fieldSelector"))?;
    let mut target = Target::parse(&parts.method, path, parameters.is_true("watch"))?;
    if target.name.is_none() && parts.method == Method::GET {
        // a field selector of one name needs only permission for that object
        let named = Target { name: selector.name().map(str::to_owned), ..target.clone() };
        authorize(state, &user, &named)?;
    } else {
        authorize(state, &user, &target)?;
    }
    let faults = state.faults.take(&user.name, &target);
    for fault in &faults {
        match fault {
            Fault::Delay(time) => tokio::time::sleep(*time).await,
            Fault::Refuse(failure) => return Err(failure.clone()),
            _ => {}
        }
    }
    let convert = converter(&parts.headers, &faults);
    if target.verb == "watch" {
        target.name = None;
        return watch(state, target, &parameters, selector, convert, &faults);
    }
    let body = to_bytes(body, MAX_BODY).await;
    let body = body.map_err(|error| Failure::new(413, "RequestEntityTooLarge", error.to_string()))?;
    let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let arguments =
        Arguments { parameters: &parameters, selector, content_type: content_type.unwrap_or_default() };
    let (code, object) = execute(state, &target, &arguments, &body)?;
    if let Some(Fault::ExecuteThenRefuse(failure)) =
        faults.iter().find(|fault| matches!(fault, Fault::ExecuteThenRefuse(_)))
    {
        return Err(failure.clone());
    }
    let full = Bytes::from(convert(object).to_string());
    let body = inject_body_faults(stream::iter([Ok(full)]), &faults);
    Ok(response(code, "application/json", body))
}

fn authorize(state: &State, user: &User, target: &Target) -> Result<(), Failure> {
    let mut access = state.access();
    access.authorize(&state.store(), user, target)
}

/// A request without its target and body.
struct Arguments<'a> {
    parameters: &'a Parameters,
    selector: Selector,
    content_type: &'a str,
}

fn execute(
    state: &State,
    target: &Target,
    arguments: &Arguments<'_>,
    body: &[u8],
) -> Result<(u16, Value), Failure> {
    let full = |object: Arc<Value>| (*object).clone();
    match target.verb {
        "get" => read::get(&state.store(), target).map(|object| (200, object)),
        "list" => {
            let page = state.behaviour().page;
            let limit = arguments.parameters.number("limit")?.map_or(usize::MAX, |limit| limit as usize);
            let options = read::Options {
                selector: arguments.selector.clone(),
                limit: if limit == 0 { page } else { limit.min(page) },
                continue_token: arguments.parameters.text("continue").to_owned(),
                version: arguments.parameters.text("resourceVersion").to_owned(),
                version_match: arguments.parameters.text("resourceVersionMatch").to_owned(),
            };
            read::list(&state.store(), target, &options).map(|list| (200, list))
        }
        "create" => {
            let object = parse(body)?;
            state.write(|store| write::create(store, target, &object)).map(|object| (201, full(object)))
        }
        "update" => {
            let object = parse(body)?;
            let (object, is_new) = state.write(|store| write::update(store, target, &object))?;
            Ok((if is_new { 201 } else { 200 }, full(object)))
        }
        "patch" => {
            let change = parse(body)?;
            let patched = state.write(|store| write::patch(store, target, arguments.content_type, &change));
            patched.map(|object| (200, full(object)))
        }
        "delete" => {
            let options = if body.is_empty() { Value::Null } else { parse(body)? };
            state.write(|store| write::delete(store, target, &options)).map(|object| (200, full(object)))
        }
        "deletecollection" => {
            let options = read::Options { selector: arguments.selector.clone(), ..read::Options::default() };
            let deleted = state.write(|store| {
                let list = read::list(store, target, &options)?;
                for object in list["items"].as_array().into_iter().flatten() {
                    let text = |field: &str| object["metadata"][field].as_str().map(str::to_owned);
                    let namespace = text("namespace").unwrap_or_default();
                    let one = Target { name: text("name"), namespace, ..target.clone() };
                    write::delete(store, &one, &Value::Null)?;
                }
                Ok(list)
            });
            deleted.map(|list| (200, list))
        }
        verb => Err(Failure::new(405, "MethodNotAllowed", verb)),
    }
}

fn watch(
    state: &Arc<State>,
    target: Target,
    parameters: &Parameters,
    selector: Selector,
    convert: fn(Value) -> Value,
    faults: &[Fault],
) -> Result<Response, Failure> {
    let options = watch::Options {
        selector,
        version: parameters.text("resourceVersion").to_owned(),
        version_match: parameters.text("resourceVersionMatch").to_owned(),
        bookmarks: parameters.is_true("allowWatchBookmarks"),
        initial_events: parameters.get("sendInitialEvents").map(|value| value == "true" || value == "1"),
        timeout: parameters.number("timeoutSeconds")?,
    };
    options.check(state.behaviour().streaming_lists)?;
    let (sender, mut lines) = mpsc::channel(16);
    let commands = state.faults.commands();
    let watch = Watch { state: Arc::clone(state), target, options, convert, sender, commands };
    tokio::spawn(watch.run());
    let lines = stream::poll_fn(move |context| lines.poll_recv(context));
    Ok(response(200, "application/json", inject_body_faults(lines, faults)))
}

/// Returns the body with its faults: full, in chunks, or truncated.
fn inject_body_faults(
    bytes: impl Stream<Item = Result<Bytes, io::Error>> + Send + 'static,
    faults: &[Fault],
) -> Body {
    if faults.contains(&Fault::Truncate) {
        let half = bytes.take(1).map(|chunk| chunk.map(|chunk| chunk.slice(..chunk.len() / 2)));
        let broken = io::Error::new(io::ErrorKind::ConnectionReset, "connection reset by an injected fault");
        // the first half is sent before the error
        let end = stream::once(async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Err(broken)
        });
        return Body::from_stream(half.chain(end));
    }
    let trickle = faults.iter().find_map(|fault| match fault {
        Fault::Trickle(size, pause) => Some((*size, *pause)),
        _ => None,
    });
    let Some((size, pause)) = trickle else { return Body::from_stream(bytes) };
    let chunks = bytes.flat_map(move |full| {
        let chunks: Vec<Result<Bytes, io::Error>> = match full {
            Ok(full) => full.chunks(size.max(1)).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect(),
            Err(error) => vec![Err(error)],
        };
        stream::iter(chunks)
    });
    Body::from_stream(chunks.then(move |chunk| async move {
        tokio::time::sleep(pause).await;
        chunk
    }))
}

/// Returns the conversion of an object or list that the `Accept` header and the faults ask for.
fn converter(headers: &HeaderMap, faults: &[Fault]) -> fn(Value) -> Value {
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if faults.contains(&Fault::WrongTypes) {
        return |mut object| {
            each_object(&mut object, |object| object["metadata"] = json!(17));
            object
        };
    }
    if accepts.contains("as=PartialObjectMetadata") {
        return |mut object| {
            let is_list = object.get("items").is_some();
            each_object(&mut object, |object| {
                let metadata = object["metadata"].take();
                *object = json!({
                    "apiVersion": "meta.k8s.io/v1",
                    "kind": "PartialObjectMetadata",
                    "metadata": metadata,
                });
            });
            if is_list {
                object["apiVersion"] = json!("meta.k8s.io/v1");
                object["kind"] = json!("PartialObjectMetadataList");
            }
            object
        };
    }
    |object| object
}

fn each_object(object: &mut Value, mut change: impl FnMut(&mut Value)) {
    match object.get_mut("items").and_then(Value::as_array_mut) {
        Some(items) => items.iter_mut().for_each(change),
        None => change(object),
    }
}

fn parse(body: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::bad_request(format!("the object provided is unrecognized: {error}")))
}

impl Parameters {
    fn of(uri: &Uri) -> Result<Self, Failure> {
        let query = Query::<Vec<(String, String)>>::try_from_uri(uri);
        Ok(Self(query.map_err(|error| Failure::bad_request(error.to_string()))?.0))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn text(&self, name: &str) -> &str {
        self.get(name).unwrap_or_default()
    }

    fn is_true(&self, name: &str) -> bool {
        matches!(self.get(name), Some("true" | "1"))
    }

    fn number(&self, name: &str) -> Result<Option<u64>, Failure> {
        let parse = |text: &str| {
            text.parse()
                .map_err(|_no_number| Failure::bad_request(format!("{name}: invalid value \"{text}\"")))
        };
        self.get(name).filter(|text| !text.is_empty()).map(parse).transpose()
    }
}

fn error_response(failure: &Failure) -> Response {
    let mut response = json_response(failure.code, &failure.status());
    if let Some(seconds) = failure.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

fn json_response(code: u16, value: &Value) -> Response {
    response(code, "application/json", Body::from(value.to_string()))
}

fn response(code: u16, content_type: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}
