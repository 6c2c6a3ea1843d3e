//! What a caller may ask for one call, as extensions of its request
//!
//! A call that is sent again keeps what it was asked.

use std::{fmt, sync::Arc};

use callsign_core::policy::Headers;
use http::{Extensions, HeaderMap};

use crate::instance::Address;

/// A request extension: the call waits for an endpoint to be ready up to its deadline, not up to the pick timeout
///
/// ```
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(callsign::WaitForReady);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitForReady;

/// A request extension: what policies that hash take for the call, a user's id for example
///
/// Other policies pay no attention to it.
///
/// ```
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(callsign::HashKey::new("user-7"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HashKey(Arc<[u8]>);

impl HashKey {
    /// A key of these bytes, whatever they are
    pub fn new(key: impl AsRef<[u8]>) -> Self {
        Self(key.as_ref().into())
    }

    /// The bytes
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A request extension: the call goes to this endpoint or nowhere
///
/// Also to one that is ejected, and whatever the policy is. While the endpoint is not ready the call waits for it as any
/// other does, up to the pick timeout or, with [`WaitForReady`], its deadline; then it is UNAVAILABLE, and the message says
/// where the endpoint stands, or that the channel has none with this address. Of the address host and port count.
///
/// ```
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(callsign::PinnedEndpoint("10.0.0.1:9090".parse()?));
/// # Ok::<(), callsign::instance::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PinnedEndpoint(pub Address);

/// A request extension: the call never goes to this endpoint, even if it is the only one
///
/// Without another one that is ready the call waits as any other does, up to the pick timeout or, with [`WaitForReady`], its
/// deadline; then it is UNAVAILABLE, and the message says why. Of the address host and port count.
///
/// ```
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(callsign::ExcludedEndpoint("10.0.0.1:9090".parse()?));
/// # Ok::<(), callsign::instance::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExcludedEndpoint(pub Address);

/// The options of one call
#[derive(Debug)]
pub(super) struct Options {
    pub(super) wait_for_ready: bool,
    /// Boxed for its size: most calls ask for none.
    choice: Option<Box<Choice>>,
}

/// What a call says of its endpoint
#[derive(Debug)]
struct Choice {
    key: Option<HashKey>,
    pinned: Option<PinnedEndpoint>,
    excluded: Option<ExcludedEndpoint>,
}

impl Choice {
    fn is_any(&self) -> bool {
        self.key.is_some() || self.pinned.is_some() || self.excluded.is_some()
    }
}

impl Options {
    /// Takes the options out of a request's extensions
    pub(super) fn take(extensions: &mut Extensions) -> Self {
        let wait_for_ready = extensions.remove::<WaitForReady>().is_some();
        let (key, pinned, excluded) = (extensions.remove(), extensions.remove(), extensions.remove());
        let choice = Choice { key, pinned, excluded };
        Self { wait_for_ready, choice: choice.is_any().then(|| Box::new(choice)) }
    }

    pub(super) fn key(&self) -> Option<&[u8]> {
        self.choice.as_ref()?.key.as_ref().map(HashKey::as_bytes)
    }

    pub(super) fn pinned(&self) -> Option<&Address> {
        self.choice.as_ref()?.pinned.as_ref().map(|PinnedEndpoint(address)| address)
    }

    pub(super) fn excluded(&self) -> Option<&Address> {
        self.choice.as_ref()?.excluded.as_ref().map(|ExcludedEndpoint(address)| address)
    }

    /// Whether the caller lets the call go to `address` at all
    pub(super) fn permit(&self, address: &Address) -> bool {
        let is = |other: &Address| other.authority() == address.authority();
        self.pinned().is_none_or(is) && !self.excluded().is_some_and(is)
    }
}

/// What one call asks of a pick
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) options: &'a Options,
    pub(super) headers: RequestHeaders<'a>,
    /// The endpoint that has just handed the call back: another one is wanted
    pub(super) avoid: Option<u64>,
}

/// A request's headers, as policies see them
#[derive(Clone, Copy)]
pub(super) struct RequestHeaders<'a>(pub(super) &'a HeaderMap);

impl Headers for RequestHeaders<'_> {
    fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(http::HeaderValue::as_bytes)
    }
}

impl fmt::Debug for RequestHeaders<'_> {
    /// Names only: values may be secrets
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn options_are_taken_out_of_the_extensions_once() {
        let mut extensions = Extensions::new();
        extensions.insert(WaitForReady);
        extensions.insert(HashKey::new("user-7"));
        extensions.insert(7_u32);
        let options = Options::take(&mut extensions);
        assert_eq!((options.wait_for_ready, options.key()), (true, Some(b"user-7".as_slice())));
        assert_eq!((options.pinned(), options.excluded()), (None, None));
        assert_eq!(extensions.len(), 1, "what is not ours stays");
        assert!(Options::take(&mut extensions).key().is_none());
    }

    #[test]
    fn a_call_may_go_where_it_is_pinned_and_not_where_it_is_excluded() {
        let permits = |insert: &dyn Fn(&mut Extensions), to: &str| {
            let mut extensions = Extensions::new();
            insert(&mut extensions);
            Options::take(&mut extensions).permit(&address(to))
        };
        let pinned: &dyn Fn(&mut Extensions) = &|all| drop(all.insert(PinnedEndpoint(address("a:1"))));
        let excluded: &dyn Fn(&mut Extensions) = &|all| drop(all.insert(ExcludedEndpoint(address("a:1"))));
        assert!(permits(&|_| {}, "a:1"));
        assert!(permits(pinned, "a:1") && permits(pinned, "https://a:1") && !permits(pinned, "b:1"));
        assert!(!permits(excluded, "a:1") && permits(excluded, "a:2"));
    }

    #[test]
    fn headers_reach_policies_whatever_case_they_are_asked_in_and_secrets_stay_out_of_debug() {
        let mut headers = HeaderMap::new();
        headers.insert("x-user", "7".parse().unwrap());
        let headers = RequestHeaders(&headers);
        assert_eq!(headers.get("x-user"), Some(b"7".as_slice()));
        assert_eq!(headers.get("x-other"), None);
        assert_eq!(format!("{headers:?}"), "{\"x-user\"}");
    }
}
