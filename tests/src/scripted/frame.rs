//! HTTP/2 frames by hand (RFC 9113, sections 4 and 6)

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a client says first (section 3.4)
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(super) const DATA: u8 = 0x0;
pub(super) const HEADERS: u8 = 0x1;
pub(super) const RST_STREAM: u8 = 0x3;
pub(super) const SETTINGS: u8 = 0x4;
pub(super) const PING: u8 = 0x6;
pub(super) const GOAWAY: u8 = 0x7;
pub(super) const WINDOW_UPDATE: u8 = 0x8;

/// Of SETTINGS and PING
pub(super) const ACK: u8 = 0x1;
/// Of DATA and HEADERS
pub(super) const END_STREAM: u8 = 0x1;
/// Of HEADERS
pub(super) const END_HEADERS: u8 = 0x4;
/// Of DATA
const PADDED: u8 = 0x8;

const MAX_CONCURRENT_STREAMS: u16 = 0x3;
const INITIAL_WINDOW_SIZE: u16 = 0x4;

/// One frame
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    /// Reads one; `None` at the end of the connection, however it came
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> Option<Self> {
        let mut head = [0; 9];
        from.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        from.read_exact(&mut payload).await.ok()?;
        Some(Self { kind, flags, stream: u32::from_be_bytes(stream) & (u32::MAX >> 1), payload })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("frames of these scripts are short");
        let mut bytes = length.to_be_bytes()[1..].to_vec();
        bytes.extend([self.kind, self.flags]);
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    pub(super) fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The content of a DATA frame
    pub(super) fn data(&self) -> &[u8] {
        match (self.is(PADDED), self.payload.split_first()) {
            (true, Some((padding, rest))) => &rest[..rest.len() - usize::from(*padding)],
            _ => &self.payload,
        }
    }

    /// The error code of RST_STREAM
    pub(super) fn code(&self) -> u32 {
        self.payload.first_chunk().map_or(0, |code| u32::from_be_bytes(*code))
    }

    pub(super) fn settings(streams: Option<u32>, window: u32) -> Self {
        let mut payload = setting(INITIAL_WINDOW_SIZE, window);
        if let Some(streams) = streams {
            payload.extend(setting(MAX_CONCURRENT_STREAMS, streams));
        }
        Self::new(SETTINGS, 0, 0, payload)
    }

    /// The answer to a SETTINGS or PING frame
    pub(super) fn ack(&self) -> Self {
        let payload = if self.kind == PING { self.payload.clone() } else { Vec::new() };
        Self::new(self.kind, ACK, 0, payload)
    }

    pub(super) fn window_update(stream: u32, bytes: u32) -> Self {
        Self::new(WINDOW_UPDATE, 0, stream, bytes.to_be_bytes())
    }

    pub(super) fn rst_stream(stream: u32, code: u32) -> Self {
        Self::new(RST_STREAM, 0, stream, code.to_be_bytes())
    }

    pub(super) fn goaway(last: u32, code: u32) -> Self {
        Self::new(GOAWAY, 0, 0, [last.to_be_bytes(), code.to_be_bytes()].concat())
    }

    /// `:status: 200` and `content-type: application/grpc`
    pub(super) fn response_headers(stream: u32) -> Self {
        // RFC 7541: entry 8 of the static table, then a literal without indexing whose name is entry 31.
        let block = [&[0x88, 0x0f, 31 - 15][..], &string("application/grpc")].concat();
        Self::new(HEADERS, END_HEADERS, stream, block)
    }

    /// One gRPC message without content, the default of any message type
    pub(super) fn empty_message(stream: u32) -> Self {
        Self::new(DATA, 0, stream, [0; 5])
    }

    /// `grpc-status: 0`, the end of the stream
    pub(super) fn trailers(stream: u32) -> Self {
        // RFC 7541, section 6.2.2: a literal without indexing with a new name.
        let block = [vec![0], string("grpc-status"), string("0")].concat();
        Self::new(HEADERS, END_HEADERS | END_STREAM, stream, block)
    }
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// A short string without Huffman coding (RFC 7541, section 5.2)
fn string(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).ok().filter(|length| *length < 127).expect("a short text");
    [&[length], text.as_bytes()].concat()
}
