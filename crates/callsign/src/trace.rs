//! The span of a call, for those who listen

use tonic::Code;
use tracing::{Id, Span};

use crate::{instance::Address, metrics::code_name};

/// A call's span, or nothing if nobody listens: then it costs a null pointer, wherever a call goes
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace(Option<Box<Span>>);

impl Trace {
    pub(crate) fn new(span: Span) -> Self {
        Self((!span.is_disabled()).then(|| Box::new(span)))
    }

    /// Says where the call is sent
    pub(crate) fn sent_to(&self, endpoint: &Address) {
        if let Some(span) = &self.0 {
            span.record("endpoint", tracing::field::display(endpoint));
        }
    }

    /// Says what the call ended with
    pub(crate) fn ended(&self, code: Code) {
        if let Some(span) = &self.0 {
            span.record("code", code_name(code));
        }
    }

    /// The parent of events within the call
    pub(crate) fn id(&self) -> Option<Id> {
        self.0.as_ref()?.id()
    }
}
