//! A TCP connection to a name with several addresses: "happy eyeballs" (RFC 8305)
//!
//! One address after the other, without waiting until the one before has failed: a dead one costs a moment, not the whole
//! time that there is for a connection.

use std::{
    future::{Future, poll_fn},
    io, iter, mem,
    net::SocketAddr,
    pin::Pin,
    task::Poll,
    time::Duration,
};

use tokio::{
    net::{TcpStream, lookup_host},
    time::sleep,
};

use crate::instance::Address;

/// How long the addresses tried so far have before the next one is tried too: RFC 8305, section 5, recommends this.
const HEAD_START: Duration = Duration::from_millis(250);

/// Data that stays unacknowledged for this long ends the connection: gRFC A18 ties it to the keepalive timeout, 20 s.
#[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Connects to the first address of `address` that answers
pub(super) async fn dial(address: &Address) -> io::Result<TcpStream> {
    let found = lookup_host((address.host(), address.port())).await?;
    let tcp = first(interleaved(found.collect()), TcpStream::connect).await?;
    tcp.set_nodelay(true)?;
    #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
    if let Err(error) = socket2::SockRef::from(&tcp).set_tcp_user_timeout(Some(USER_TIMEOUT)) {
        // Some sandboxes refuse it. Calls are watched by pings all the same.
        tracing::trace!(%address, %error, "no TCP_USER_TIMEOUT");
    }
    Ok(tcp)
}

/// The addresses by turns of one family and the other, beginning with the resolver's choice
fn interleaved(addresses: Vec<SocketAddr>) -> impl Iterator<Item = SocketAddr> {
    let is_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == is_ipv6);
    let (mut now, mut then) = (first.into_iter(), second.into_iter());
    iter::from_fn(move || {
        let next = now.next().or_else(|| then.next());
        mem::swap(&mut now, &mut then);
        next
    })
}

/// The first connection that is made; the last failure if none is
///
/// Attempts are parts of this future: those that are still under way end with it.
async fn first<F, T>(
    addresses: impl Iterator<Item = SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let mut addresses = addresses.peekable();
    let mut attempts = Vec::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        attempts.extend(addresses.next().map(|address| Box::pin(connect(address))));
        if attempts.is_empty() {
            return Err(failure);
        }
        tokio::select! {
            ended = next_ended(&mut attempts) => match ended {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = error,
            },
            () = sleep(HEAD_START), if addresses.peek().is_some() => {}
        }
    }
}

/// Waits until one of the attempts has ended, and takes it out
async fn next_ended<F: Future>(attempts: &mut Vec<Pin<Box<F>>>) -> F::Output {
    poll_fn(|cx| {
        for position in 0..attempts.len() {
            if let Poll::Ready(output) = attempts[position].as_mut().poll(cx) {
                drop(attempts.swap_remove(position));
                return Poll::Ready(output);
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::{
        net::TcpListener,
        time::{Instant, timeout},
    };

    use super::*;

    fn addresses(text: &str) -> Vec<SocketAddr> {
        text.split(' ').map(|address| format!("{address}:80").parse().unwrap()).collect()
    }

    /// Port 1 refuses, port 2 is silent, port 3 takes 400 ms, any other connects at once
    async fn connect(address: SocketAddr) -> io::Result<u16> {
        match address.port() {
            1 => return Err(io::ErrorKind::ConnectionRefused.into()),
            2 => pending().await,
            3 => sleep(Duration::from_millis(400)).await,
            _ => {}
        }
        Ok(address.port())
    }

    async fn timed(ports: &[u16]) -> (Result<u16, io::ErrorKind>, Duration) {
        let start = Instant::now();
        let addresses = ports.iter().map(|&port| SocketAddr::from(([127, 0, 0, 1], port)));
        let connected = timeout(HEAD_START * 10, first(addresses, connect)).await;
        let connected =
            connected.unwrap_or(Err(io::ErrorKind::TimedOut.into())).map_err(|error| error.kind());
        (connected, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_has_a_head_start_and_who_refuses_has_none() {
        assert_eq!(timed(&[4]).await, (Ok(4), Duration::ZERO));
        assert_eq!(timed(&[1, 4]).await, (Ok(4), Duration::ZERO));
        let (connected, took) = timed(&[2, 4]).await;
        assert!(connected == Ok(4) && (HEAD_START..HEAD_START * 2).contains(&took), "{took:?}");
        let (connected, took) = timed(&[2, 1, 2, 4]).await;
        assert!(connected == Ok(4) && (HEAD_START * 2..HEAD_START * 3).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_slow_may_still_be_the_first() {
        let (connected, took) = timed(&[3, 2, 2]).await;
        assert!(connected == Ok(3) && took < HEAD_START * 2, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_have_failed_the_last_says_why() {
        assert_eq!(timed(&[1, 1]).await, (Err(io::ErrorKind::ConnectionRefused), Duration::ZERO));
        assert_eq!(timed(&[]).await, (Err(io::ErrorKind::NotFound), Duration::ZERO));
    }

    #[test]
    fn families_take_turns_and_the_resolver_chooses_who_begins() {
        let order = |text| interleaved(addresses(text)).collect::<Vec<_>>();
        assert_eq!(order("[::1] [::2] [::3] 1.1.1.1"), addresses("[::1] 1.1.1.1 [::2] [::3]"));
        assert_eq!(order("1.1.1.1 [::1] [::2] 1.1.1.2"), addresses("1.1.1.1 [::1] 1.1.1.2 [::2]"));
        assert_eq!(order("1.1.1.1 1.1.1.2"), addresses("1.1.1.1 1.1.1.2"));
    }

    /// A name whose first address was dead could not be reached: it took all the time that there was
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_name_whose_first_address_is_a_black_hole_is_reached_at_its_second() {
        // Linux drops the SYNs for a queue that is full.
        let hole = tokio::net::TcpSocket::new_v4().unwrap();
        hole.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let hole = hole.listen(1).unwrap();
        let mut queued = Vec::new();
        while let Ok(connected) =
            timeout(Duration::from_millis(100), TcpStream::connect(hole.local_addr().unwrap())).await
        {
            queued.push(connected.unwrap());
        }
        let well = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [&hole, &well].map(|listener| listener.local_addr().unwrap());
        let connected = timeout(HEAD_START * 4, first(addresses.into_iter(), TcpStream::connect)).await;
        assert_eq!(connected.unwrap().unwrap().peer_addr().unwrap(), addresses[1]);
    }
}
