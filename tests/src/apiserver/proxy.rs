//! Requests that the server passes on to a pod.

use axum::{
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Kind, PORT, Shared, status::Status};

/// Passes a request on to a pod's port, `NAME:PORT`, as the real one does.
pub(super) async fn proxy(
    shared: &Shared,
    namespace: &str,
    name: &str,
    path: &str,
) -> Result<Response, Status> {
    let unavailable = |error: &dyn std::fmt::Display| {
        Status::unavailable(format!("error trying to reach service: {error}"))
    };
    let address = {
        let store = shared.store();
        store.check("get", Kind::Pod, "proxy")?;
        let (name, port) = name.split_once(':').unwrap_or((name, "80"));
        let pod = store.get(Kind::Pod, namespace, name);
        let pod = pod.ok_or_else(|| Status::not_found(&format!("pods {name:?}")))?;
        // All pods of a test have one address; it names the port that stands for this one.
        let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
        let port = pod["metadata"]["annotations"][PORT].as_str().unwrap_or(port);
        format!("{ip}:{port}")
    };
    let mut stream = TcpStream::connect(&address).await.map_err(|e| unavailable(&e))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|e| unavailable(&e))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(|e| unavailable(&e))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let code = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    let code = code.and_then(|code| StatusCode::from_u16(code).ok());
    Ok((code.unwrap_or(StatusCode::BAD_GATEWAY), body.to_owned()).into_response())
}
