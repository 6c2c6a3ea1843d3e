//! Free ports on 127.0.0.1 that stay free while nobody listens on them

use std::{io, net::TcpListener, process};

/// Below every system's ephemeral ports (Linux 32768, others 49152)
///
/// A server that is killed leaves its port for some seconds. An ephemeral one could meanwhile become the local port of
/// an outgoing connection, even of the client that dials the dead server, and then the server could not bind it again.
const RANGE: std::ops::Range<u16> = 20_000..30_000;

/// So many different ports on which nobody listens
pub(crate) fn free(count: usize) -> io::Result<Vec<u16>> {
    // Two demos at the same time start their search at different places.
    let skip = (process::id() as usize * 16) % RANGE.len();
    let listeners: Vec<_> = RANGE
        .skip(skip)
        .chain(RANGE.take(skip))
        .filter_map(|port| TcpListener::bind(("127.0.0.1", port)).ok())
        .take(count)
        .collect();
    if listeners.len() < count {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("no {count} free ports in {RANGE:?}")));
    }
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_different_and_never_ephemeral() {
        let mut ports = free(4).unwrap();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 4);
        assert!(ports.iter().all(|port| RANGE.contains(port)), "{ports:?}");
    }
}
