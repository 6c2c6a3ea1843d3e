//! Which instances a channel connects to, and how: the settings for that

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use callsign_core::{keepalive::KeepAlive, subset::Subset};

#[cfg(feature = "etcd")]
use super::target::{TargetError, redacted};
use super::{SettingsError, around::Around, selection::Accept};
#[cfg(feature = "etcd")]
use crate::instance::Address;
#[cfg(feature = "tls")]
use crate::tls::{Connector, Tls};
use crate::{connection::Transport, instance::Instance};

/// What the setters of `connecting_settings!` have set
#[derive(Default)]
pub(super) struct Connecting {
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
    #[cfg(feature = "tls")]
    trusts_discovered_names: bool,
    /// All names that are dialled stand in the configuration, as a target's.
    #[cfg(feature = "tls")]
    names_are_configured: bool,
    keepalive: Option<Duration>,
    pub(super) accept: Option<Accept>,
    subset: Option<usize>,
    pub(super) around: Around,
}

/// The shortest interval: gRFC A8 has clients go no lower.
const SHORTEST: Duration = Duration::from_secs(10);
/// Time to answer a periodic ping, the same as without them.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

impl Connecting {
    #[cfg(feature = "tls")]
    pub(super) fn set_tls(&mut self, tls: Tls) {
        self.tls = Some(tls);
    }

    #[cfg(feature = "tls")]
    pub(super) fn trust_discovered_names(&mut self) {
        self.trusts_discovered_names = true;
    }

    pub(super) fn set_accept(&mut self, accept: impl Fn(&Instance) -> bool + Send + Sync + 'static) {
        self.accept = Some(Box::new(accept));
    }

    pub(super) fn set_subset(&mut self, size: usize) {
        self.subset = Some(size);
    }

    pub(super) fn set_zone(&mut self, zone: Arc<str>) {
        // As in metadata, an empty one is none.
        self.around.zone = Some(zone).filter(|zone| !zone.is_empty());
    }

    pub(super) fn set_slow_start(&mut self, window: Duration) {
        self.around.slow_start = window;
    }

    pub(super) fn set_keepalive(&mut self, interval: Duration) {
        self.keepalive = Some(interval);
    }

    /// All addresses stand in `target`: none is skipped, and one that cannot be used is an error
    #[cfg(all(feature = "etcd", feature = "tls"))]
    pub(super) fn take_configured(&mut self, addresses: &[Address], target: &str) -> Result<(), TargetError> {
        self.names_are_configured = true;
        if addresses.iter().any(Address::is_https) {
            self.tls.get_or_insert_default();
        }
        if self.tls.is_some() && addresses.iter().any(Address::is_http) {
            return Err(TargetError::Mixed(redacted(target)));
        }
        Ok(())
    }

    #[cfg(all(feature = "etcd", not(feature = "tls")))]
    pub(super) fn take_configured(&mut self, addresses: &[Address], target: &str) -> Result<(), TargetError> {
        // Going on in plaintext would be a silent downgrade.
        match addresses.iter().any(Address::is_https) {
            true => Err(TargetError::Https(redacted(target))),
            false => Ok(()),
        }
    }

    /// Reads and checks what TLS needs
    #[cfg(feature = "tls")]
    pub(super) fn transport(&self) -> Result<Transport, SettingsError> {
        let Some(tls) = &self.tls else { return Ok(Transport::Plain) };
        if tls.trusts_any_name() && !self.names_are_configured && !self.trusts_discovered_names {
            return Err(SettingsError::DiscoveredNames);
        }
        Ok(Transport::Tls(Connector::new(tls)?))
    }

    #[cfg(not(feature = "tls"))]
    #[allow(clippy::unnecessary_wraps, reason = "only TLS can be set wrongly")]
    pub(super) fn transport(&self) -> Result<Transport, SettingsError> {
        Ok(Transport::Plain)
    }

    pub(super) fn keep_alive(&self) -> Result<KeepAlive, SettingsError> {
        match self.keepalive {
            None => Ok(KeepAlive::default()),
            Some(interval) if interval < SHORTEST => Err(SettingsError::Keepalive(interval)),
            Some(interval) => Ok(KeepAlive::Periodic { interval, timeout: PING_TIMEOUT }),
        }
    }

    pub(super) fn subset(&self) -> Result<Option<Subset>, SettingsError> {
        let Some(size) = self.subset else { return Ok(None) };
        let size = NonZeroUsize::new(size).ok_or(SettingsError::Subset)?;
        // Each channel draws its own: two in one process are two clients.
        Ok(Some(Subset::new(size, fastrand::u64(..))))
    }
}

/// The setters for that, which both builders have
macro_rules! connecting_settings {
    () => {
        /// Speaks TLS with every instance
        ///
        /// Default: plaintext, but for a `direct:///` target whose addresses are `https://`, which uses the system's roots.
        /// Addresses without a scheme, as registries mostly hold, go with the channel. A scheme in the registry changes
        /// nothing: a channel with TLS skips `http://` instances, one without skips `https://` ones, with one warning each.
        ///
        /// The name to verify is [`Tls::server_name`](crate::Tls::server_name), else each instance's host, which is the
        /// registry's word: that is why it takes a CA of your own, or
        /// [`trust_system_roots_for_discovered_names`](Self::trust_system_roots_for_discovered_names). Files are read when
        /// the channel is built, and again for each connection.
        #[cfg(feature = "tls")]
        pub fn tls(mut self, tls: $crate::tls::Tls) -> Self {
            self.settings.connecting.set_tls(tls);
            self
        }

        /// Lets the system's roots vouch for whatever names discovery gives
        ///
        /// Default: that is an error, unless [`Tls`](crate::Tls) names a CA or the name to verify, or the names stand in a
        /// `direct:///` target. With it, whoever can write to the registry and owns a certificate for any name in the
        /// world can pass for an instance: allow it where nobody else writes to the registry.
        #[cfg(feature = "tls")]
        pub fn trust_system_roots_for_discovered_names(mut self) -> Self {
            self.settings.connecting.trust_discovered_names();
            self
        }

        /// Connects to no instance of which this says `false`
        ///
        /// Default: all are accepted. It is asked whenever discovery tells of an instance, known or new, by the channel's own
        /// task: it should be quick. An instance that is no longer accepted goes as one that was removed does. If it
        /// panics, the instance counts as not accepted, and an error is logged.
        ///
        /// ```
        /// # use callsign::{Channel, discover::fixed};
        /// let channel = Channel::builder(fixed([])).accept(|instance| instance.metadata.version() == Some("2"));
        /// ```
        pub fn accept(
            mut self,
            accept: impl Fn(&$crate::instance::Instance) -> bool + Send + Sync + 'static,
        ) -> Self {
            self.settings.connecting.set_accept(accept);
            self
        }

        /// Connects to this many instances at most
        ///
        /// Default: all of them. Each channel chooses its own at random (rendezvous hashing, gRFC A68), so that all
        /// instances have about as many clients; when an instance comes or goes, one connection moves at most. Of use
        /// where many clients meet hundreds of servers: 32, which go-zero takes, is still enough to balance over. Fewer
        /// spread the load less evenly and leave fewer to go to when some fail. Zero is an error.
        pub fn subset(mut self, size: usize) -> Self {
            self.settings.connecting.set_subset(size);
            self
        }

        /// Calls instances of this zone while there are enough of them
        ///
        /// Default: none is preferred. While at least half of the endpoints of the zone can be used, they take all calls;
        /// else all endpoints do, so that the rest of a zone is not overrun. Calls are faster and cheaper, but a zone with
        /// many clients and few servers gets more than its share. An instance's zone is in its metadata.
        pub fn zone(mut self, zone: impl Into<std::sync::Arc<str>>) -> Self {
            self.settings.connecting.set_zone(zone.into());
            self
        }

        /// Lets an endpoint that has just come take its share little by little, over this time
        ///
        /// Default: zero, which is off: the policy alone decides. Its share begins at a tenth and grows evenly (Envoy's slow
        /// start). The time begins when an endpoint is first connected to, and when its server has registered anew; not
        /// with a mere reconnect. For servers that are slow at first, with cold caches or code that is yet to be
        /// compiled; the others carry more meanwhile.
        pub fn slow_start(mut self, window: std::time::Duration) -> Self {
            self.settings.connecting.set_slow_start(window);
            self
        }

        /// Sends a PING this often on each connection with a call on it, whatever is read
        ///
        /// Default: none; a PING goes out only when calls wait in silence, and as seldom as every gRPC server bears with.
        /// Periodic ones keep a quiet stream alive through a NAT or a proxy that forgets, but take the place of those
        /// after 5 s of silence: a dead peer that nobody suspects is found within the interval and 3 s. A server has to
        /// permit them: grpc-go by default closes a connection that is pinged more often than every 5 min. Each time
        /// that one says so (ENHANCE_YOUR_CALM), its interval is doubled, up to 2 h (gRFC A8). Less than 10 s is an error.
        pub fn keepalive(mut self, interval: std::time::Duration) -> Self {
            self.settings.connecting.set_keepalive(interval);
            self
        }
    };
}
pub(super) use connecting_settings;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepalive_is_ten_seconds_at_least() {
        let keep_alive = |interval| {
            let mut connecting = Connecting::default();
            connecting.set_keepalive(interval);
            connecting.keep_alive()
        };
        let expected = KeepAlive::Periodic { interval: SHORTEST, timeout: PING_TIMEOUT };
        assert_eq!(keep_alive(SHORTEST).unwrap(), expected);
        let short = Duration::from_millis(9999);
        assert!(matches!(keep_alive(short), Err(SettingsError::Keepalive(told)) if told == short));
        assert_eq!(Connecting::default().keep_alive().unwrap(), KeepAlive::default());
    }

    #[test]
    fn a_subset_of_nobody_is_an_error_and_an_empty_zone_is_none() {
        let mut connecting = Connecting::default();
        assert!(connecting.subset().unwrap().is_none());
        connecting.set_subset(0);
        assert!(matches!(connecting.subset(), Err(SettingsError::Subset)));
        connecting.set_subset(1);
        assert!(connecting.subset().unwrap().is_some());
        connecting.set_zone("".into());
        assert_eq!(connecting.around.zone, None);
    }

    #[test]
    #[cfg(all(feature = "etcd", feature = "tls"))]
    fn a_target_asks_for_tls_or_goes_with_the_settings_and_never_mixes() {
        let take = |tls: Option<Tls>, addresses: &[&str]| {
            let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            let mut connecting = Connecting { tls, ..Connecting::default() };
            connecting.take_configured(&addresses, "the target").map(|()| connecting.tls.is_some())
        };
        let with = || Some(Tls::new());
        for (tls, addresses, expected) in [
            (None, &["a:1", "http://b:1"][..], false),
            (None, &["a:1", "https://b:1"], true),
            (with(), &["a:1", "https://b:1"], true),
            (with(), &["a:1"], true),
        ] {
            assert_eq!(take(tls, addresses).unwrap(), expected, "{addresses:?}");
        }
        for (tls, addresses) in [(None, &["http://a:1", "https://b:1"][..]), (with(), &["a:1", "http://b:1"])]
        {
            let refused = take(tls, addresses).unwrap_err();
            assert!(matches!(&refused, TargetError::Mixed(target) if target == "the target"), "{refused}");
        }
    }

    #[test]
    #[cfg(all(feature = "etcd", not(feature = "tls")))]
    fn a_build_without_tls_says_what_a_target_with_https_needs() {
        let refused = Connecting::default().take_configured(&["https://a:1".parse().unwrap()], "the target");
        assert!(refused.unwrap_err().to_string().contains("feature `tls`"));
    }
}
