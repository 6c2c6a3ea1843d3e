//! One watch on one stream

use etcd_client::{WatchOptions, WatchResponse, WatchStream};
use tokio::time::timeout;

use super::{
    lane::{Lane, Link, REQUEST},
    request::RequestError,
};

/// etcd sends one revision in one message, however many keys it changed: tonic's 4 MB would end the stream.
pub(crate) const MAX_MESSAGE: usize = 64 << 20;

/// An open watch; dropping it ends it on the server too
///
/// Any failure, a refusal in band included, ends it: open another one. A failure of the host has moved the lane.
pub(crate) struct Watch {
    lane: Lane,
    link: Link,
    /// The one that it was opened with
    token: Option<u64>,
    stream: WatchStream,
}

impl Watch {
    /// Opens a watch and waits until etcd has confirmed it
    pub(crate) async fn open(lane: &Lane, key: &str, options: WatchOptions) -> Result<Self, RequestError> {
        let link = lane.link();
        let token = link.token();
        match Self::open_on(lane, &link, key, options.clone()).await {
            // A token is part of the stream, and is refused in band: only a new stream has a new one.
            Err(error) if link.doubt(token.or_else(|| link.token()), &error) => {
                Self::open_on(lane, &link, key, options).await
            }
            opened => opened,
        }
    }

    async fn open_on(
        lane: &Lane,
        link: &Link,
        key: &str,
        options: WatchOptions,
    ) -> Result<Self, RequestError> {
        let opened = link.ask(REQUEST, |client| async move {
            let mut watches = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
            watches.watch(key, Some(options)).await
        });
        let stream = lane.settle(link, opened.await)?;
        let mut watch = Self { lane: lane.clone(), link: link.clone(), token: link.token(), stream };
        // A frozen member accepts the stream and says nothing.
        match timeout(REQUEST, watch.receive()).await {
            Ok(created) => created?,
            Err(_) => watch.settle(Err(RequestError::timeout(watch.link.host(), "opening a watch")))?,
        };
        Ok(watch)
    }

    /// The next message; cancel safe
    pub(crate) async fn next(&mut self) -> Result<WatchResponse, RequestError> {
        let message = self.receive().await;
        if let Err(error) = &message {
            self.link.doubt(self.token, error);
        }
        message
    }

    async fn receive(&mut self) -> Result<WatchResponse, RequestError> {
        let message = match self.stream.message().await {
            Ok(Some(message)) if message.canceled() => Err(RequestError::canceled(
                self.link.host(),
                message.compact_revision(),
                message.cancel_reason(),
            )),
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(RequestError::host(self.link.host(), "the watch's stream has ended")),
            Err(error) => Err(self.link.error(&error)),
        };
        self.settle(message)
    }

    fn settle<T>(&self, answer: Result<T, RequestError>) -> Result<T, RequestError> {
        self.lane.settle(&self.link, answer)
    }
}
