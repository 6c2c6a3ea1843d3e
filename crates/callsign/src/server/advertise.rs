//! Which address a server publishes

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{UdpSocket, lookup_host},
    time::{sleep, timeout},
};

use crate::{etcd::Etcd, instance::Address};

/// A name server that does not answer must not keep a server from starting for long.
const LOOKUP: Duration = Duration::from_secs(2);

/// Between two looks for a way to etcd, which needs a name server or a network that is not there yet. Seldom enough for a
/// name server that is in trouble.
const AGAIN: Duration = Duration::from_secs(2);

/// The address under which others reach a socket bound to `bound`
///
/// That is `bound` itself, unless it was bound to all addresses (`0.0.0.0`, `[::]`). Then it is `POD_IP` if that is set,
/// else the address from which the system would send to an etcd host, which is on the network that the clients see too.
/// Nothing is sent.
///
/// # Errors
///
/// [`AdvertiseError`] if `POD_IP` is no IP address, or if there is no route to any etcd host.
pub async fn advertised(bound: SocketAddr, etcd: &Etcd) -> Result<Address, AdvertiseError> {
    if !bound.ip().is_unspecified() {
        return Ok(bound.into());
    }
    let ip = match std::env::var("POD_IP") {
        Ok(ip) if !ip.is_empty() => parse(ip)?,
        _ => source_towards(etcd.hosts(), bound.is_ipv4()).await?,
    };
    Ok(SocketAddr::new(ip, bound.port()).into())
}

/// What `look` finds, however long there is no route; `failed` hears of each look in vain
pub(super) async fn found<F>(
    mut look: impl FnMut() -> F,
    mut failed: impl FnMut(&AdvertiseError),
) -> Result<Address, AdvertiseError>
where
    F: Future<Output = Result<Address, AdvertiseError>>,
{
    loop {
        match look().await {
            Err(error @ AdvertiseError::NoRoute { .. }) => failed(&error),
            settled => return settled,
        }
        sleep(AGAIN).await;
    }
}

fn parse(ip: String) -> Result<IpAddr, AdvertiseError> {
    ip.parse().map_err(|_| AdvertiseError::PodIp { value: ip.escape_debug().to_string() })
}

async fn source_towards(hosts: &[Address], v4_only: bool) -> Result<IpAddr, AdvertiseError> {
    let mut cause = io::Error::other("no host has an address of the family that was bound");
    for host in hosts {
        match timeout(LOOKUP, lookup_host((host.host(), host.port()))).await {
            Ok(Ok(targets)) => {
                for target in targets.filter(|target| target.is_ipv4() || !v4_only) {
                    match source(target).await {
                        Ok(ip) => return Ok(ip),
                        Err(error) => cause = error,
                    }
                }
            }
            Ok(Err(error)) => cause = error,
            Err(_) => cause = io::Error::new(io::ErrorKind::TimedOut, "looking up the host timed out"),
        }
    }
    Err(AdvertiseError::NoRoute { cause })
}

/// Connecting a UDP socket sends nothing: the system only picks the route, and with it the source address
async fn source(target: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(target).await?;
    Ok(socket.local_addr()?.ip())
}

/// Why there is no address to publish
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdvertiseError {
    /// `POD_IP` is set to something else than an IP address: correct it
    #[error("POD_IP is \"{value}\", which is no IP address")]
    PodIp {
        /// Its value, escaped
        value: String,
    },
    /// The system knows no way to any etcd host: bind a certain address, or advertise one
    #[error("listening on all addresses, and none of them leads to etcd: advertise one")]
    NoRoute {
        /// What went wrong with the last host
        #[source]
        cause: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;
    use crate::etcd::EtcdOptions;

    fn etcd(hosts: &[&str]) -> Etcd {
        Etcd::connect_lazy(EtcdOptions::new(hosts)).unwrap()
    }

    #[tokio::test]
    async fn a_certain_address_is_published_as_it_is() {
        let address = advertised("10.1.2.3:9090".parse().unwrap(), &etcd(&["127.0.0.1:2379"])).await.unwrap();
        assert_eq!(address.to_string(), "10.1.2.3:9090");
    }

    #[tokio::test]
    async fn all_addresses_are_published_as_the_one_that_leads_to_etcd() {
        let etcd = etcd(&["127.0.0.1:2379"]);
        for bound in ["0.0.0.0:9090", "[::]:9090"] {
            let address = advertised(bound.parse().unwrap(), &etcd).await.unwrap();
            assert_eq!(address.to_string(), "127.0.0.1:9090");
        }
    }

    #[tokio::test]
    async fn an_ipv4_server_is_not_published_as_ipv6() {
        let error = advertised("0.0.0.0:9090".parse().unwrap(), &etcd(&["[::1]:2379"])).await.unwrap_err();
        assert!(matches!(error, AdvertiseError::NoRoute { .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_way_to_etcd_is_looked_for_until_there_is_one() {
        let no_route = || AdvertiseError::NoRoute { cause: io::ErrorKind::NetworkUnreachable.into() };
        let (mut looks, mut failures) = (0, 0);
        let look = || {
            looks += 1;
            ready(if looks < 4 { Err(no_route()) } else { Ok("10.0.0.7:80".parse().unwrap()) })
        };
        assert_eq!(found(look, |_| failures += 1).await.unwrap().to_string(), "10.0.0.7:80");
        assert_eq!((looks, failures), (4, 3));
        let wrong = || ready(Err(AdvertiseError::PodIp { value: "pod-7".into() }));
        assert!(matches!(found(wrong, |_| ()).await, Err(AdvertiseError::PodIp { .. })));
    }

    #[test]
    fn a_pod_ip_that_is_none_is_an_error() {
        assert_eq!(parse("10.0.0.7".into()).unwrap().to_string(), "10.0.0.7");
        assert!(matches!(parse("pod-7".into()), Err(AdvertiseError::PodIp { .. })));
    }
}
