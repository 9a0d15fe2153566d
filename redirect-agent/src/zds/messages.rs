//! ZDS on the wire: the protobuf messages of Istio's `zds.proto`, package `istio.workload.zds`,
//! written out by hand, and the decoders for the bytes that come from a proxy.
//!
//! One message is one packet, without a length prefix. Tags are ztunnel's
//! (`proto/zds.proto`); `DelWorkload.uid` really is field 2.

use prost::Message as _;

/// The most bytes ztunnel reads of one message (ztunnel `src/inpod/protocol.rs`, `read_message`).
pub const MAX_REQUEST_BYTES: usize = 1024;

/// The most bytes we read of one message: a refusal carries an error text of ztunnel's.
pub const MAX_RESPONSE_BYTES: usize = 4096;

/// The version of ZDS that both sides speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Version {
    /// What a hello without a version says.
    NotUsed = 0,
    /// The only version there is.
    V1 = 1,
}

/// The first packet on a connection, proxy to agent.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ZdsHello {
    /// The version that the proxy speaks.
    #[prost(enumeration = "Version", tag = "1")]
    pub version: i32,
}

/// Who a workload is; ztunnel derives its SPIFFE identity from it.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WorkloadInfo {
    /// Name of the pod.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Namespace of the pod.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Service account of the pod.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// Start serving a workload. Exactly one fd, the pod's network namespace, rides on its packet.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct AddWorkload {
    /// UID of the Kubernetes pod.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Optional on the wire only: ztunnel exits when it is missing.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// Do not stop this workload, if it is running, when the snapshot ends. Before [`SnapshotSent`] only.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct KeepWorkload {
    /// UID of the Kubernetes pod.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// Stop serving a workload and close its connections.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct DelWorkload {
    /// UID of the Kubernetes pod.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// The snapshot is complete: ztunnel stops what was neither added nor kept. Once per connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct SnapshotSent {}

/// What the agent sends; each is answered with one [`WorkloadResponse`].
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WorkloadRequest {
    /// Always set: ztunnel takes an empty message for the end of the connection.
    #[prost(oneof = "Request", tags = "1, 2, 3, 5")]
    pub payload: Option<Request>,
}

/// The kinds of request.
#[derive(Clone, PartialEq, Eq, Hash, prost::Oneof)]
pub enum Request {
    /// Start serving a workload.
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// Stop serving a workload.
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// The snapshot is complete.
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// Do not stop a workload when the snapshot ends.
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

impl Request {
    /// The packet that carries this request: 1 byte or more.
    pub fn to_packet(&self) -> Vec<u8> {
        WorkloadRequest { payload: Some(self.clone()) }.encode_to_vec()
    }
}

/// What the proxy answers a request with.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WorkloadResponse {
    /// There is only one kind of response.
    #[prost(oneof = "Response", tags = "1")]
    pub payload: Option<Response>,
}

/// The kinds of response.
#[derive(Clone, PartialEq, Eq, Hash, prost::Oneof)]
pub enum Response {
    /// The request was carried out or refused.
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// The proxy carried a request out, or says why not. It names no request: acks come in order.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Ack {
    /// Empty when all went well.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// Why bytes that a proxy sent are not what it had to send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not protobuf, or not that message.
    #[error("{length} bytes that are no {expected}: {reason}")]
    Malformed {
        /// How many bytes came.
        length: usize,
        /// The message that had to come.
        expected: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// A hello of a version that we do not speak.
    #[error("a hello of ZDS version {0}; the agent speaks version 1 only")]
    Version(i32),
    /// A response that is neither ack nor refusal.
    #[error("a response without an ack")]
    NoAck,
}

/// Reads the hello, which must be of version 1.
pub fn decode_hello(packet: &[u8]) -> Result<(), DecodeError> {
    let hello = ZdsHello::decode(packet).map_err(|e| DecodeError::Malformed {
        length: packet.len(),
        expected: "hello",
        reason: e.to_string(),
    })?;
    match Version::try_from(hello.version) {
        Ok(Version::V1) => Ok(()),
        _ => Err(DecodeError::Version(hello.version)),
    }
}

/// Reads the answer to a request; the inner error is the proxy's reason for a refusal.
pub fn decode_response(packet: &[u8]) -> Result<Result<(), String>, DecodeError> {
    let response = WorkloadResponse::decode(packet).map_err(|e| DecodeError::Malformed {
        length: packet.len(),
        expected: "response",
        reason: e.to_string(),
    })?;
    match response.payload {
        Some(Response::Ack(Ack { error })) if error.is_empty() => Ok(Ok(())),
        Some(Response::Ack(Ack { error })) => Ok(Err(error)),
        None => Err(DecodeError::NoAck),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes a stock ztunnel sends and accepts.
    #[test]
    fn the_wire_is_byte_for_byte_that_of_a_stock_ztunnel() {
        let hello = ZdsHello { version: Version::V1.into() };
        assert_eq!(hello.encode_to_vec(), [0x08, 0x01]);
        assert_eq!(decode_hello(&[0x08, 0x01]), Ok(()));

        assert_eq!(Request::SnapshotSent(SnapshotSent {}).to_packet(), [0x1a, 0x00]);

        let add = Request::Add(AddWorkload {
            uid: "u-1".into(),
            workload_info: Some(WorkloadInfo {
                name: "pod1".into(),
                namespace: "ns1".into(),
                service_account: "sa1".into(),
            }),
        });
        let packet = b"\x0a\x17\x0a\x03u-1\x12\x10\x0a\x04pod1\x12\x03ns1\x1a\x03sa1";
        assert_eq!(add.to_packet(), packet);

        let del = Request::Del(DelWorkload { uid: "u-1".into() });
        assert_eq!(del.to_packet(), b"\x12\x05\x12\x03u-1");
        let keep = Request::Keep(KeepWorkload { uid: "u-1".into() });
        assert_eq!(keep.to_packet(), b"\x2a\x05\x0a\x03u-1");

        assert_eq!(decode_response(&[0x0a, 0x00]), Ok(Ok(())));
        assert_eq!(decode_response(b"\x0a\x06\x0a\x04busy"), Ok(Err("busy".into())));
    }

    #[test]
    fn an_info_of_empty_strings_is_still_there_on_the_wire() {
        let add = AddWorkload { uid: "u".into(), workload_info: Some(WorkloadInfo::default()) };
        assert_eq!(Request::Add(add).to_packet(), b"\x0a\x05\x0a\x01u\x12\x00");
    }

    #[test]
    fn fields_of_a_later_zds_are_skipped() {
        assert_eq!(decode_hello(b"\x08\x01\x12\x03new"), Ok(()));
        assert_eq!(decode_response(b"\x0a\x05\x12\x03new"), Ok(Ok(())));
    }

    #[test]
    fn what_is_no_hello_is_named() {
        assert_eq!(decode_hello(&[]), Err(DecodeError::Version(0)));
        assert_eq!(decode_hello(&[0x08, 0x02]), Err(DecodeError::Version(2)));
        let error = decode_hello(&[0x0a, 0x00]).unwrap_err().to_string();
        assert!(error.starts_with("2 bytes that are no hello: "), "{error}");
    }

    #[test]
    fn what_is_no_response_is_named() {
        assert_eq!(decode_response(&[]), Err(DecodeError::NoAck));
        let error = decode_response(&[0x08, 0x01]).unwrap_err().to_string();
        assert!(error.starts_with("2 bytes that are no response: "), "{error}");
        decode_response(b"\x0a\x04\x0a\x02\xff\xfe").unwrap_err();
        decode_response(&[0xff; 64]).unwrap_err();
    }
}
