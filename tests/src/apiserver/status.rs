//! Kubernetes' `Status`: what a request that fails is answered with.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// A refusal.
#[derive(Debug)]
pub(super) struct Status {
    code: u16,
    reason: &'static str,
    message: String,
}

impl Status {
    fn new(code: u16, reason: &'static str, message: String) -> Self {
        Self { code, reason, message }
    }

    pub(super) fn bad_request(message: String) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized".to_owned())
    }

    pub(super) fn forbidden(verb: &str, resource: &str, group: &str) -> Self {
        Self::new(
            403,
            "Forbidden",
            format!(
                "{resource} is forbidden: User \"system:serviceaccount:istio-system:redirect-agent\" \
                 cannot {verb} resource {resource:?} in API group {group:?} at the cluster scope"
            ),
        )
    }

    pub(super) fn not_found(what: &str) -> Self {
        Self::new(404, "NotFound", format!("{what} not found"))
    }

    pub(super) fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json".to_owned();
        Self::new(406, "NotAcceptable", message)
    }

    pub(super) fn already_exists(what: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{what} already exists"))
    }

    pub(super) fn conflict(message: String) -> Self {
        Self::new(409, "Conflict", message)
    }

    pub(super) fn expired() -> Self {
        Self::new(410, "Expired", "too old resource version: it is compacted".to_owned())
    }

    pub(super) fn unsupported_media_type() -> Self {
        let message = "the body of the request was in an unknown format - accepted media types \
                       include: application/json, application/merge-patch+json";
        Self::new(415, "UnsupportedMediaType", message.to_owned())
    }

    pub(super) fn invalid(message: String) -> Self {
        Self::new(422, "Invalid", message)
    }

    pub(super) fn too_many_requests() -> Self {
        let message = "too many requests, please try again later";
        Self::new(429, "TooManyRequests", message.to_owned())
    }

    pub(super) fn unavailable(message: String) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    pub(super) fn too_new() -> Self {
        Self::new(504, "Timeout", "Too large resource version".to_owned())
    }

    pub(super) fn code(&self) -> u16 {
        self.code
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        })
    }
}

impl IntoResponse for Status {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (code, Json(self.to_json())).into_response()
    }
}
