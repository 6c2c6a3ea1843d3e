//! Ports that stay ours while nobody listens on them
//!
//! A port that was found free and let go, or whose server was killed, may become the port of another process's listener, or
//! of an outgoing connection. So it is kept: by a socket that is bound to it and never listens. The system then gives the
//! port to nobody who asks for any port, and who listens on it by name can.

use std::net::{Ipv4Addr, SocketAddr};

use callsign::Address;
use tokio::net::TcpSocket;

/// A port that is ours until this is dropped
///
/// Servers bind it beside this one with SO_REUSEADDR, which those of Rust and Go set by themselves.
#[derive(Debug)]
pub struct Port(TcpSocket);

impl Port {
    /// Any port on 127.0.0.1
    pub fn any() -> Self {
        Self::at(([127, 0, 0, 1], 0).into())
    }

    /// The port of this address, or any if it is zero
    ///
    /// # Panics
    ///
    /// If somebody listens there, or if it is somebody else's.
    pub fn at(address: SocketAddr) -> Self {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let socket = socket.expect("descriptors are left");
        socket.set_reuseaddr(true).expect("a new socket takes options");
        socket.bind(address).expect("the port is free, or ours");
        Self(socket)
    }

    /// Where it is
    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().expect("the socket is bound")
    }

    /// Its number
    pub fn number(&self) -> u16 {
        self.address().port()
    }
}

/// Where a server listens that is to have many addresses, of any port
pub fn everywhere() -> Address {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).into()
}

/// 127.1.x.y: on Linux every address of 127.0.0.0/8 is this machine, so a server that listens [`everywhere`] is as many as
/// one likes
pub fn local(number: u16, port: u16) -> Address {
    let [high, low] = number.to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, 1, high, low), port)).into()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_kept_port_can_be_listened_on_again_and_again() {
        let port = Port::any();
        for _ in 0..2 {
            let listener = TcpListener::bind(port.address()).unwrap();
            assert_eq!(listener.local_addr().unwrap(), port.address());
        }
        let beside = Port::at(port.address());
        drop(port);
        TcpListener::bind(beside.address()).unwrap();
    }
}
