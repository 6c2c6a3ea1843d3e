//! What is logged in a thread: the lines, by level and message

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::{DefaultGuard, Interest},
};

/// Records what callsign logs in this thread until it is dropped
///
/// Of use where everything runs in one thread: in a test's own runtime of the default flavour.
#[derive(Debug)]
pub struct Lines {
    lines: Arc<Mutex<Vec<Line>>>,
    _guard: DefaultGuard,
}

/// One event
#[derive(Clone, Debug)]
pub struct Line {
    /// How serious
    pub level: Level,
    /// The message and then the fields: `watching service=hello.rpc`
    pub text: String,
}

impl Lines {
    /// Records from now on, debug and above
    pub fn record() -> Self {
        ask_always();
        let lines = Arc::<Mutex<Vec<Line>>>::default();
        let guard = tracing::subscriber::set_default(Recorder(Some(Arc::clone(&lines))));
        Self { lines, _guard: guard }
    }

    /// Lines of this level and more serious ones so far
    pub fn at(&self, level: Level) -> Vec<Line> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| line.level <= level).cloned().collect()
    }

    /// How many lines begin like this, at any level that is recorded
    pub fn beginning(&self, text: &str) -> usize {
        self.at(Level::DEBUG).iter().filter(|line| line.text.starts_with(text)).count()
    }
}

/// Has tracing ask each thread anew whether it wants an event
///
/// Else it asks once for each place that logs, and while one thread alone records, whichever thread comes there first: when
/// that is another test's, the place is silent from then on.
pub fn ask_always() {
    // Whoever was here before has done the same.
    let _ = tracing::subscriber::set_global_default(Recorder(None));
}

/// Where events are written down; without, nobody wants any, which may change
struct Recorder(Option<Arc<Mutex<Vec<Line>>>>);

impl Subscriber for Recorder {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.is_some()
            && metadata.is_event()
            && metadata.target().starts_with("callsign")
            && *metadata.level() <= Level::DEBUG
    }

    fn event(&self, event: &Event<'_>) {
        let Some(lines) = &self.0 else { return };
        let mut text = Text::default();
        event.record(&mut text);
        let line = Line { level: *event.metadata().level(), text: text.message + &text.fields };
        lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // No span is enabled.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // A String takes everything.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_another_thread_came_to_first_is_recorded() {
        let say = || tracing::warn!(target: "callsign::x", "said");
        let lines = Lines::record();
        std::thread::spawn(say).join().unwrap();
        say();
        assert_eq!(lines.beginning("said"), 1);
    }

    #[test]
    fn lines_are_told_by_level_and_text_and_end_with_the_recorder() {
        let lines = Lines::record();
        tracing::warn!(target: "callsign::x", service = "a", "watching");
        tracing::debug!(target: "callsign::x", "watching again");
        tracing::trace!(target: "callsign::x", "watching closely");
        tracing::warn!(target: "h2", "watching");
        assert_eq!(lines.at(Level::INFO).len(), 1);
        assert_eq!(lines.at(Level::INFO)[0].text, "watching service=\"a\"");
        assert_eq!(lines.beginning("watching"), 2);
    }
}
