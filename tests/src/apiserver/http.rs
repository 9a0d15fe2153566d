//! The requests, and their answers.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Request as HttpRequest, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Cut, Kind, Request, Shared, TOKEN,
    proxy::proxy,
    status::Status,
    store::{Change, Selector, in_core, merge, shown},
};

/// Bodies are small.
const LONGEST_BODY: usize = 1 << 20;
/// Source: Kubernetes `staging/src/k8s.io/apimachinery/pkg/types/patch.go`.
const MERGE_PATCH: &str = "application/merge-patch+json";
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let router = Router::new().fallback(answer).with_state(shared);
    if let Err(error) = axum::serve(listener, router).await {
        eprintln!("the API server: {error}");
    }
}

/// A request, taken apart.
struct Asked {
    kind: Kind,
    namespace: String,
    name: String,
    subresource: String,
    /// What is asked of the pod, if the request is passed on to it.
    rest: String,
    query: HashMap<String, String>,
    content_type: String,
    /// Only the metadata is wanted.
    metadata: bool,
    body: Value,
}

async fn answer(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Response {
    let delay = shared.delay_ms.load(Ordering::Relaxed);
    if delay > 0 {
        sleep(Duration::from_millis(delay)).await;
    }
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let asked = match axum::body::to_bytes(body, LONGEST_BODY).await {
        _ if shared.knows_nobody.load(Ordering::Relaxed) => Err(Status::unauthorized()),
        Ok(body) => take_apart(parts.uri.path(), &query, &parts.headers, &body),
        Err(error) => Err(Status::bad_request(error.to_string())),
    };
    let (verb, resource, name, body) = match &asked {
        Ok(asked) => {
            let resource = match asked.subresource.as_str() {
                "" => asked.kind.plural().to_owned(),
                sub => format!("{}/{sub}", asked.kind.plural()),
            };
            (verb(&parts.method, asked), resource, asked.name.clone(), asked.body.clone())
        }
        Err(_) => ("", String::new(), String::new(), Value::Null),
    };
    let loses = verb == "patch" && shared.loses_answers.load(Ordering::Relaxed);
    let busy = shared.busy.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    let result = match asked {
        Ok(_) if busy.is_ok() => Err(Status::too_many_requests()),
        Ok(asked) if asked.subresource == "proxy" => {
            proxy(&shared, &asked.namespace, &asked.name, &asked.rest).await
        }
        Ok(asked) => carry_out(&shared, verb, &asked),
        Err(status) => Err(status),
    };
    let code = match &result {
        Ok(response) => response.status().as_u16(),
        Err(status) => status.code(),
    };
    shared.requests().push(Request { verb, resource, name, query, body, code });
    if loses {
        let broken = stream::iter([Err::<Bytes, io::Error>(io::ErrorKind::ConnectionReset.into())]);
        return Response::new(Body::from_stream(broken));
    }
    result.unwrap_or_else(Status::into_response)
}

fn verb(method: &Method, asked: &Asked) -> &'static str {
    let watches = asked.query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    match *method {
        Method::GET if watches => "watch",
        Method::GET if asked.name.is_empty() => "list",
        Method::GET => "get",
        Method::POST => "create",
        Method::PATCH => "patch",
        _ => "other",
    }
}

fn take_apart(path: &str, query: &str, headers: &HeaderMap, body: &[u8]) -> Result<Asked, Status> {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if header(header::AUTHORIZATION) != format!("Bearer {TOKEN}") {
        return Err(Status::unauthorized());
    }
    let metadata = match header(header::ACCEPT).replace(' ', "").as_str() {
        "" | "*/*" | "application/json" => false,
        METADATA | METADATA_LIST => true,
        _ => return Err(Status::not_acceptable()),
    };
    let unknown = || Status::not_found("the server could not find the requested resource");
    let (group, rest) = if let Some(rest) = path.strip_prefix("/api/v1/") {
        ("", rest)
    } else if let Some(rest) = path.strip_prefix("/apis/events.k8s.io/v1/") {
        ("events.k8s.io", rest)
    } else if let Some(rest) = path.strip_prefix("/apis/apps/v1/") {
        ("apps", rest)
    } else if let Some(rest) = path.strip_prefix("/apis/discovery.k8s.io/v1/") {
        ("discovery.k8s.io", rest)
    } else {
        return Err(unknown());
    };
    let parts: Vec<&str> = rest.split('/').collect();
    let (namespace, plural, rest) = match parts.as_slice() {
        ["namespaces", name] => ("", "namespaces", std::slice::from_ref(name)),
        ["namespaces", namespace, plural, rest @ ..] => (*namespace, *plural, rest),
        [plural, rest @ ..] => ("", *plural, rest),
        [] => return Err(unknown()),
    };
    let kinds = [
        Kind::Pod,
        Kind::Namespace,
        Kind::Node,
        Kind::ConfigMap,
        Kind::Event,
        Kind::DaemonSet,
        Kind::Service,
        Kind::EndpointSlice,
    ];
    // Events are written in their own group, and read in the core's, too.
    let group = if plural == Kind::Event.plural() { Kind::Event.group() } else { group };
    let is_meant = |kind: &Kind| (kind.group(), kind.plural()) == (group, plural);
    let kind = kinds.into_iter().find(is_meant).ok_or_else(unknown)?;
    let (name, subresource) = match rest {
        [] => ("", ""),
        [name] => (*name, ""),
        [name, subresource] => (*name, *subresource),
        [name, "proxy", _] => (*name, "proxy"),
        _ => return Err(unknown()),
    };
    let body = match body {
        [] => Value::Null,
        body => serde_json::from_slice(body)
            .map_err(|error| Status::bad_request(format!("read the body: {error}")))?,
    };
    Ok(Asked {
        kind,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        subresource: subresource.to_owned(),
        rest: path.split_once("/proxy").map_or("", |(_, rest)| rest).to_owned(),
        query: read_query(query),
        content_type: header(header::CONTENT_TYPE).to_owned(),
        metadata,
        body,
    })
}

fn read_query(query: &str) -> HashMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decode(key), decode(value))).collect()
}

/// `%3D` is `=`, and `+` a space.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let escaped = tail.get(..2).filter(|_| *first == b'%');
        let escaped = escaped.and_then(|hex| std::str::from_utf8(hex).ok());
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => bytes.push(if *first == b'+' { b' ' } else { *first }),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn carry_out(shared: &Arc<Shared>, verb: &str, asked: &Asked) -> Result<Response, Status> {
    shared.store().check(verb, asked.kind, &asked.subresource)?;
    match (verb, asked.kind, asked.subresource.as_str()) {
        ("list", Kind::Pod | Kind::Namespace | Kind::Node | Kind::Event, "")
        | ("list", Kind::Service | Kind::EndpointSlice, "") => list(shared, asked),
        ("watch", Kind::Pod | Kind::Namespace | Kind::Node, "") => watch_changes(shared, asked),
        ("get", Kind::DaemonSet | Kind::Namespace | Kind::ConfigMap, "") => get(shared, asked),
        ("patch", Kind::Pod, "status") => patch_pod_status(shared, asked),
        ("create", Kind::Event, "") => create_event(shared, asked),
        ("patch", Kind::Event, "") => patch_event(shared, asked),
        _ => Err(Status::forbidden(verb, asked.kind.plural(), asked.kind.group())),
    }
}

fn selector(asked: &Asked) -> Result<Selector, Status> {
    let text = |key: &str| asked.query.get(key).map_or("", String::as_str);
    Selector::parse(asked.kind, text("fieldSelector"), text("labelSelector"))
}

fn get(shared: &Shared, asked: &Asked) -> Result<Response, Status> {
    let store = shared.store();
    let found = store.get(asked.kind, &asked.namespace, &asked.name);
    let what = || format!("{}.{} {:?}", asked.kind.plural(), asked.kind.group(), asked.name);
    let object = found.ok_or_else(|| Status::not_found(&what()))?;
    Ok(Json(shown(object, asked.metadata)).into_response())
}

/// Pages are of the state when the first was asked for; a token names its version and where to go on.
fn list(shared: &Shared, asked: &Asked) -> Result<Response, Status> {
    let selector = selector(asked)?;
    let limit: usize = number(asked, "limit")?.unwrap_or(usize::MAX);
    let store = shared.store();
    let (version, from) = match asked.query.get("continue") {
        None => (store.version, 0),
        Some(token) => {
            if asked.query.contains_key("resourceVersion") {
                let message = "specifying resource version is not allowed when using continue";
                return Err(Status::bad_request(message.to_owned()));
            }
            let (version, from) = token
                .split_once('-')
                .and_then(|(version, from)| Some((version.parse().ok()?, from.parse().ok()?)))
                .ok_or_else(|| Status::bad_request("continue key is not valid".to_owned()))?;
            (version, from)
        }
    };
    if version < store.compacted {
        return Err(Status::expired());
    }
    // The state of then: today's, with later changes taken back.
    let mut objects = store.objects.clone();
    let later: Vec<&Change> = store.since(version).filter(|c| c.kind == asked.kind).collect();
    for change in later.into_iter().rev() {
        let Some(object) = change.before.as_ref().or(change.after.as_ref()) else { continue };
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let key = (asked.kind, text("namespace"), text("name"));
        match &change.before {
            Some(before) => drop(objects.insert(key, before.clone())),
            None => drop(objects.remove(&key)),
        }
    }
    let matching: Vec<Value> = objects
        .iter()
        .filter(|((kind, namespace, _), _)| {
            *kind == asked.kind && (asked.namespace.is_empty() || asked.namespace == *namespace)
        })
        .map(|(_, object)| match asked.kind {
            Kind::Event => in_core(object),
            _ => object.clone(),
        })
        .filter(|object| selector.matches(object))
        .collect();
    let page: Vec<Value> =
        matching.iter().skip(from).take(limit).map(|o| shown(o, asked.metadata)).collect();
    let mut metadata = json!({"resourceVersion": version.to_string()});
    let next = from + page.len();
    if next < matching.len() {
        metadata["continue"] = format!("{version}-{next}").into();
        metadata["remainingItemCount"] = (matching.len() - next).into();
    }
    let (kind, api) = match asked.metadata {
        true => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1"),
        false if asked.kind == Kind::Event => ("EventList".to_owned(), "v1"),
        false => (format!("{}List", asked.kind.name()), asked.kind.api_version()),
    };
    // As the real one: what is in a list of its own kind does not say its kind.
    let items: Vec<Value> = page
        .into_iter()
        .map(|mut item| {
            if !asked.metadata
                && let Some(item) = item.as_object_mut()
            {
                item.remove("kind");
                item.remove("apiVersion");
            }
            item
        })
        .collect();
    let list = json!({"kind": kind, "apiVersion": api, "metadata": metadata, "items": items});
    Ok(Json(list).into_response())
}

fn number<T: std::str::FromStr>(asked: &Asked, key: &str) -> Result<Option<T>, Status> {
    match asked.query.get(key).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(value) => match value.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(Status::bad_request(format!("invalid {key}: {value:?}"))),
        },
    }
}

/// A watch under way.
struct Watch {
    shared: Arc<Shared>,
    kind: Kind,
    selector: Selector,
    metadata: bool,
    wants_bookmarks: bool,
    version: u64,
    /// Lines to send before anything else.
    lines: Vec<Value>,
    ends: Instant,
    changed: watch::Receiver<u64>,
    cut: watch::Receiver<(u64, Cut)>,
    bookmarks: watch::Receiver<u64>,
    /// It is over when these lines are sent.
    last: bool,
}

fn watch_changes(shared: &Arc<Shared>, asked: &Asked) -> Result<Response, Status> {
    let selector = selector(asked)?;
    let version: u64 = number(asked, "resourceVersion")?.unwrap_or(0);
    let seconds: u64 = number(asked, "timeoutSeconds")?.unwrap_or(300);
    let flag = |key: &str| asked.query.get(key).is_some_and(|value| value == "true");
    if flag("sendInitialEvents") {
        return Err(Status::invalid("sendInitialEvents is not there on this server".to_owned()));
    }
    let mut watch = Watch {
        shared: Arc::clone(shared),
        kind: asked.kind,
        selector,
        metadata: asked.metadata,
        wants_bookmarks: flag("allowWatchBookmarks"),
        version,
        lines: Vec::new(),
        ends: Instant::now() + Duration::from_secs(seconds),
        changed: shared.changed.subscribe(),
        cut: shared.cut.subscribe(),
        bookmarks: shared.bookmarks.subscribe(),
        last: shared.ends_at_once.load(Ordering::Relaxed),
    };
    let store = shared.store();
    if version == 0 {
        for object in store.objects.iter().filter(|((kind, _, _), _)| *kind == asked.kind) {
            if watch.selector.matches(object.1) {
                watch.lines.push(line("ADDED", shown(object.1, asked.metadata)));
            }
        }
        watch.version = store.version;
    } else if version < store.compacted {
        if shared.gone_as_status.load(Ordering::Relaxed) {
            return Err(Status::expired());
        }
        watch.lines.push(line("ERROR", Status::expired().to_json()));
        watch.last = true;
    } else if version > store.version {
        return Err(Status::too_new());
    }
    drop(store);
    let lines = stream::unfold(watch, |mut watch| async {
        let chunk = watch.next().await?;
        Some((chunk, watch))
    });
    let content_type = [(header::CONTENT_TYPE, "application/json;stream=watch")];
    Ok((StatusCode::OK, content_type, Body::from_stream(lines)).into_response())
}

fn line(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

impl Watch {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            self.catch_up();
            if !self.lines.is_empty() {
                let mut text = String::new();
                for line in self.lines.drain(..) {
                    text += &line.to_string();
                    text.push('\n');
                }
                return Some(Ok(text.into()));
            }
            if self.last {
                return None;
            }
            tokio::select! {
                _ = self.changed.changed() => {}
                _ = self.bookmarks.changed() => {
                    if self.wants_bookmarks {
                        let version = self.shared.store().version.to_string();
                        let bookmark = json!({
                            "kind": self.kind.name(), "apiVersion": self.kind.api_version(),
                            "metadata": {"resourceVersion": version, "creationTimestamp": null},
                            "spec": {"containers": null}, "status": {},
                        });
                        self.lines.push(line("BOOKMARK", shown(&bookmark, self.metadata)));
                    }
                }
                _ = self.cut.changed() => {
                    let (_, cut) = *self.cut.borrow_and_update();
                    if cut == Cut::Abruptly {
                        self.last = true;
                        return Some(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                    return None;
                }
                () = sleep_until(self.ends) => return None,
            }
        }
    }

    fn catch_up(&mut self) {
        let store = self.shared.store();
        let seen: Vec<Value> =
            store.since(self.version).filter_map(|change| self.seen(change)).collect();
        let version = self.version.max(store.version);
        drop(store);
        self.lines.extend(seen);
        self.version = version;
    }

    /// A change as this watch sees it: what stops to match is deleted, what begins to is added.
    fn seen(&self, change: &Change) -> Option<Value> {
        if change.kind != self.kind {
            return None;
        }
        let matches =
            |object: &Option<Value>| object.as_ref().is_some_and(|o| self.selector.matches(o));
        let show = |object: &Value| {
            let mut object = object.clone();
            object["metadata"]["resourceVersion"] = change.version.to_string().into();
            shown(&object, self.metadata)
        };
        match (&change.before, &change.after) {
            (before, Some(after)) if self.selector.matches(after) => {
                let kind = if matches(before) { "MODIFIED" } else { "ADDED" };
                Some(line(kind, show(after)))
            }
            (Some(before), _) if self.selector.matches(before) => {
                Some(line("DELETED", show(before)))
            }
            _ => None,
        }
    }
}

fn check_content_type(asked: &Asked, wanted: &str) -> Result<(), Status> {
    match asked.content_type.split(';').next() {
        Some(content_type) if content_type == wanted => Ok(()),
        _ => Err(Status::unsupported_media_type()),
    }
}

/// Source: Kubernetes `pkg/registry/core/pod/strategy.go`, `podStatusStrategy.PrepareForUpdate`.
fn patch_pod_status(shared: &Shared, asked: &Asked) -> Result<Response, Status> {
    check_content_type(asked, MERGE_PATCH)?;
    let what = format!("pods {:?}", asked.name);
    let mut store = shared.store();
    let before = store
        .get(Kind::Pod, &asked.namespace, &asked.name)
        .cloned()
        .ok_or_else(|| Status::not_found(&what))?;
    let mut after = before.clone();
    merge(&mut after, &asked.body);
    if after["metadata"]["uid"] != before["metadata"]["uid"] {
        let (wanted, is) = (&after["metadata"]["uid"], &before["metadata"]["uid"]);
        return Err(if shared.uid_conflicts.load(Ordering::Relaxed) {
            Status::conflict(format!(
                "Operation cannot be fulfilled on {what}: Precondition failed: UID in precondition: \
                 {wanted}, UID in object meta: {is}"
            ))
        } else {
            Status::invalid(format!(
                "Pod {:?} is invalid: metadata.uid: Invalid value: {wanted}: field is immutable",
                asked.name
            ))
        });
    }
    let wanted = &after["metadata"]["resourceVersion"];
    if *wanted != before["metadata"]["resourceVersion"] {
        return Err(Status::conflict(format!(
            "Operation cannot be fulfilled on {what}: the object has been modified"
        )));
    }
    after["spec"] = before["spec"].clone();
    for field in ["deletionTimestamp", "ownerReferences", "name", "namespace", "creationTimestamp"]
    {
        let old = before["metadata"][field].clone();
        match (after["metadata"].as_object_mut(), old) {
            (Some(metadata), Value::Null) => drop(metadata.remove(field)),
            (Some(metadata), old) => drop(metadata.insert(field.to_owned(), old)),
            (None, _) => return Err(Status::invalid("metadata: Required value".to_owned())),
        }
    }
    let annotations = after["metadata"]["annotations"].as_object();
    if annotations.is_some_and(|a| a.values().any(|value| !value.is_string())) {
        return Err(Status::bad_request("annotations: they have to be strings".to_owned()));
    }
    let after = store.replace(Kind::Pod, after);
    drop(store);
    shared.announce();
    Ok(Json(shown(&after, asked.metadata)).into_response())
}

/// Source: Kubernetes `pkg/apis/core/validation/events.go`, `ValidateEventCreate`.
fn check_event(event: &Value, namespace: &str) -> Result<(), Status> {
    let text = |path: &str| event.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let complain = |field: &str, why: &str| {
        Err(Status::invalid(format!("Event is invalid: {field}: Invalid value: {why}")))
    };
    if text("/metadata/namespace") != namespace || text("/regarding/namespace") != namespace {
        return complain("metadata.namespace", "does not match the regarding object's");
    }
    if text("/eventTime").is_empty() {
        return complain("eventTime", "Required value");
    }
    for (field, longest) in [
        ("/reportingController", 253),
        ("/reportingInstance", 128),
        ("/action", 128),
        ("/reason", 128),
    ] {
        let length = text(field).len();
        if length == 0 || length > longest {
            return complain(field, "must be given, and not be that long");
        }
    }
    if text("/note").len() > 1024 {
        return complain("note", "can have at most 1024 characters");
    }
    if !["Normal", "Warning"].contains(&text("/type")) {
        return complain("type", "must be Normal or Warning");
    }
    for field in ["/regarding/kind", "/regarding/name", "/regarding/uid"] {
        if text(field).is_empty() {
            return complain(field, "Required value");
        }
    }
    match event.pointer("/series/count").and_then(Value::as_u64) {
        Some(count) if count < 2 => complain("series.count", "should be at least 2"),
        _ => Ok(()),
    }
}

fn create_event(shared: &Shared, asked: &Asked) -> Result<Response, Status> {
    check_content_type(asked, "application/json")?;
    let mut store = shared.store();
    check_event(&asked.body, &asked.namespace)?;
    let name = asked.body["metadata"]["name"].as_str().unwrap_or_default();
    let prefix = asked.body["metadata"]["generateName"].as_str().unwrap_or_default();
    if name.is_empty() && prefix.is_empty() {
        let message = "Event is invalid: metadata.name: Required value: name or generateName";
        return Err(Status::invalid(message.to_owned()));
    }
    if name.len() > 253 {
        return Err(Status::invalid("metadata.name: must be no more than 253 bytes".to_owned()));
    }
    if store.get(Kind::Event, &asked.namespace, name).is_some() {
        return Err(Status::already_exists(&format!("events {name:?}")));
    }
    let event = store.put(Kind::Event, asked.body.clone());
    Ok((StatusCode::CREATED, Json(event)).into_response())
}

/// Of an event only the series may change. Source: the same, `ValidateEventUpdate`.
fn patch_event(shared: &Shared, asked: &Asked) -> Result<Response, Status> {
    check_content_type(asked, MERGE_PATCH)?;
    let mut store = shared.store();
    let before = store
        .get(Kind::Event, &asked.namespace, &asked.name)
        .cloned()
        .ok_or_else(|| Status::not_found(&format!("events {:?}", asked.name)))?;
    let mut after = before.clone();
    merge(&mut after, &asked.body);
    check_event(&after, &asked.namespace)?;
    for field in
        ["eventTime", "reportingController", "reportingInstance", "action", "reason", "note"]
    {
        if after[field] != before[field] {
            return Err(Status::invalid(format!("Event is invalid: {field}: field is immutable")));
        }
    }
    let event = store.replace(Kind::Event, after);
    Ok(Json(event).into_response())
}
