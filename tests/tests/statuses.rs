//! Statuses: a server's own pass unchanged, a connection's are made as gRPC says

use bytes::Bytes;
use callsign::{Address, Channel};
use callsign_tests::{
    bare::{Answer, Bare, headers},
    channel::over,
    echo::{Chunk, Wanted, echo_client::EchoClient},
    scripted::{Scripted, code},
};
use http::StatusCode;
use tonic::{
    Code, Status,
    metadata::{MetadataMap, MetadataValue},
};

fn client(address: Address) -> EchoClient<Channel> {
    EchoClient::new(over([address]))
}

/// With everything that a status can carry
fn said() -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert("reason", MetadataValue::from_static("quota"));
    metadata.insert_bin("trace-bin", MetadataValue::from_bytes(&[0, 255, 7]));
    let details = Bytes::from_static(&[1, 0, 254]);
    Status::with_details_and_metadata(Code::FailedPrecondition, "müde: 100 %\n", details, metadata)
}

fn assert_as_said(status: &Status) {
    let said = said();
    assert_eq!((status.code(), status.message()), (said.code(), said.message()));
    assert_eq!(status.details(), said.details());
    assert_eq!(status.metadata().get("reason"), said.metadata().get("reason"));
    assert_eq!(status.metadata().get_bin("trace-bin"), said.metadata().get_bin("trace-bin"));
}

#[tokio::test]
async fn a_servers_status_in_place_of_a_response_passes_unchanged() {
    let server = Bare::start(Answer::Headers(headers(&said()))).await;
    let mut client = client(server.address());
    assert_as_said(&client.unary(Chunk::default()).await.unwrap_err());
    assert_as_said(&client.download(Wanted::default()).await.unwrap_err());
    assert_eq!(server.take_heads().len(), 2, "a failed call is not made again");
}

#[tokio::test]
async fn an_unavailable_of_the_servers_own_is_not_made_again() {
    let server = Bare::start(Answer::Headers(headers(&Status::unavailable("says the application")))).await;
    let status = client(server.address()).unary(Chunk::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "says the application"));
    assert_eq!(server.take_heads().len(), 1);
}

#[tokio::test]
async fn a_servers_status_after_messages_passes_unchanged() {
    let server = Bare::start(Answer::MessageThen(headers(&said()))).await;
    let mut down = client(server.address()).download(Wanted::default()).await.unwrap().into_inner();
    assert_eq!(down.message().await.unwrap(), Some(Chunk::default()));
    assert_as_said(&down.message().await.unwrap_err());
}

/// "HTTP to gRPC Status Code Mapping"
const PAGES: [(u16, Code); 10] = [
    (400, Code::Internal),
    (401, Code::Unauthenticated),
    (403, Code::PermissionDenied),
    (404, Code::Unimplemented),
    (429, Code::Unavailable),
    (502, Code::Unavailable),
    (503, Code::Unavailable),
    (504, Code::Unavailable),
    (500, Code::Unknown),
    (200, Code::Unknown),
];

#[tokio::test]
async fn a_page_in_place_of_a_response_has_the_status_that_grpc_says() {
    for (page, expected) in PAGES {
        let server = Bare::start(Answer::Page(StatusCode::from_u16(page).unwrap())).await;
        let status = client(server.address()).unary(Chunk::default()).await.unwrap_err();
        assert_eq!(status.code(), expected, "{page}: {status:?}");
        for part in [server.address().to_string(), format!("HTTP {page}")] {
            assert!(status.message().contains(&part), "{status:?}");
        }
    }
}

/// "gRPC over HTTP2", Errors
const RESETS: [(u32, Code); 5] = [
    (code::PROTOCOL_ERROR, Code::Internal),
    (code::INTERNAL_ERROR, Code::Internal),
    (code::CANCEL, Code::Cancelled),
    (code::ENHANCE_YOUR_CALM, Code::ResourceExhausted),
    (code::INADEQUATE_SECURITY, Code::PermissionDenied),
];

/// Resets its first stream, before or after response headers
async fn resetting(reset: u32, responds: bool) -> Scripted {
    Scripted::start(move |_, peer| async move {
        peer.settings(None).await;
        let stream = peer.headers(0).await;
        peer.end(stream).await;
        if responds {
            peer.respond_headers(stream).await;
        }
        peer.reset(stream, reset).await;
        peer.closed().await;
    })
    .await
}

#[tokio::test]
async fn a_reset_stream_has_the_status_that_grpc_says() {
    for (reset, expected) in RESETS {
        let server = resetting(reset, false).await;
        let status = client(server.address()).unary(Chunk::default()).await.unwrap_err();
        assert_eq!(status.code(), expected, "code {reset:#x}: {status:?}");
        assert!(status.message().contains(&server.address().to_string()), "{status:?}");
        assert_eq!(server.record().calls().len(), 1, "it may have been processed");
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_after_response_headers_has_the_same_status() {
    for (reset, expected) in RESETS.into_iter().chain([(code::REFUSED_STREAM, Code::Unavailable)]) {
        let server = resetting(reset, true).await;
        // The headers and the reset may come in together; then there is no response to read from.
        let status = match client(server.address()).download(Wanted::default()).await {
            Ok(down) => down.into_inner().message().await.unwrap_err(),
            Err(status) => status,
        };
        assert_eq!(status.code(), expected, "code {reset:#x}: {status:?}");
        assert!(status.message().contains(&server.address().to_string()), "{status:?}");
    }
}
