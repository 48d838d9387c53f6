//! Requests and answers: who asks, whether they may, what goes wrong on the way.

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

/// As upstream's limit of a request.
const LONGEST: usize = 3 * 1024 * 1024;

/// Parameters of a URL.
struct Parameters(Vec<(String, String)>);

/// Every request there is.
pub(super) async fn handle(Shared(state): Shared<Arc<State>>, request: Request) -> Response {
    answer(&state, request).await.unwrap_or_else(|failure| refusal(&failure))
}

async fn answer(state: &Arc<State>, request: Request) -> Result<Response, Failure> {
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
        // who selects one object by name needs no more than the right to that one
        let named = Target { name: selector.name().map(str::to_owned), ..target.clone() };
        authorize(state, &user, &named)?;
    } else {
        authorize(state, &user, &target)?;
    }
    let faults = state.faults.of(&user.name, &target);
    for fault in &faults {
        match fault {
            Fault::Delay(time) => tokio::time::sleep(*time).await,
            Fault::Refuse(failure) => return Err(failure.clone()),
            _ => {}
        }
    }
    let show = shape(&parts.headers, &faults);
    if target.verb == "watch" {
        target.name = None;
        return watch(state, target, &parameters, selector, show, &faults);
    }
    let body = to_bytes(body, LONGEST).await;
    let body = body.map_err(|error| Failure::new(413, "RequestEntityTooLarge", error.to_string()))?;
    let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let asked = Asked { parameters: &parameters, selector, content_type: content_type.unwrap_or_default() };
    let (code, object) = perform(state, &target, &asked, &body)?;
    if let Some(Fault::DoneButRefuse(failure)) =
        faults.iter().find(|fault| matches!(fault, Fault::DoneButRefuse(_)))
    {
        return Err(failure.clone());
    }
    let whole = Bytes::from(show(object).to_string());
    let body = spoil(stream::iter([Ok(whole)]), &faults);
    Ok(response(code, "application/json", body))
}

fn authorize(state: &State, user: &User, target: &Target) -> Result<(), Failure> {
    let mut access = state.access();
    access.authorize(&state.store(), user, target)
}

/// What a request wants besides its target.
struct Asked<'a> {
    parameters: &'a Parameters,
    selector: Selector,
    content_type: &'a str,
}

fn perform(state: &State, target: &Target, asked: &Asked<'_>, body: &[u8]) -> Result<(u16, Value), Failure> {
    let whole = |object: Arc<Value>| (*object).clone();
    match target.verb {
        "get" => read::get(&state.store(), target).map(|object| (200, object)),
        "list" => {
            let longest = state.behaviour().page;
            let limit = asked.parameters.number("limit")?.map_or(usize::MAX, |limit| limit as usize);
            let options = read::Options {
                selector: asked.selector.clone(),
                limit: if limit == 0 { longest } else { limit.min(longest) },
                token: asked.parameters.text("continue").to_owned(),
                version: asked.parameters.text("resourceVersion").to_owned(),
                version_match: asked.parameters.text("resourceVersionMatch").to_owned(),
            };
            read::list(&state.store(), target, &options).map(|list| (200, list))
        }
        "create" => {
            let object = parse(body)?;
            state.write(|store| write::create(store, target, &object)).map(|object| (201, whole(object)))
        }
        "update" => {
            let object = parse(body)?;
            let (object, is_new) = state.write(|store| write::update(store, target, &object))?;
            Ok((if is_new { 201 } else { 200 }, whole(object)))
        }
        "patch" => {
            let change = parse(body)?;
            let patched = state.write(|store| write::patch(store, target, asked.content_type, &change));
            patched.map(|object| (200, whole(object)))
        }
        "delete" => {
            let options = if body.is_empty() { Value::Null } else { parse(body)? };
            state.write(|store| write::delete(store, target, &options)).map(|object| (200, whole(object)))
        }
        "deletecollection" => {
            let options = read::Options { selector: asked.selector.clone(), ..read::Options::default() };
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
    show: fn(Value) -> Value,
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
    let (sink, mut lines) = mpsc::channel(16);
    let orders = state.faults.orders();
    let watch = Watch { state: Arc::clone(state), target, options, show, sink, orders };
    tokio::spawn(watch.run());
    let lines = stream::poll_fn(move |context| lines.poll_recv(context));
    Ok(response(200, "application/json", spoil(lines, faults)))
}

/// Bytes as they arrive where faults are: whole, in pieces, or not all of them.
fn spoil(bytes: impl Stream<Item = Result<Bytes, io::Error>> + Send + 'static, faults: &[Fault]) -> Body {
    if faults.contains(&Fault::Break) {
        let half = bytes.take(1).map(|piece| piece.map(|piece| piece.slice(..piece.len() / 2)));
        let broken = io::Error::new(io::ErrorKind::ConnectionReset, "broken off on demand");
        // on its way before the end is
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
    let pieces = bytes.flat_map(move |whole| {
        let pieces: Vec<Result<Bytes, io::Error>> = match whole {
            Ok(whole) => whole.chunks(size.max(1)).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect(),
            Err(error) => vec![Err(error)],
        };
        stream::iter(pieces)
    });
    Body::from_stream(pieces.then(move |piece| async move {
        tokio::time::sleep(pause).await;
        piece
    }))
}

/// What an object, or a list of them, looks like to who sends these headers.
fn shape(headers: &HeaderMap, faults: &[Fault]) -> fn(Value) -> Value {
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

fn refusal(failure: &Failure) -> Response {
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
