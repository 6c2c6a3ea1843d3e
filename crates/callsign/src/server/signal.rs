//! Ctrl-c and SIGTERM

use std::io;

/// Completes at the next ctrl-c or, on unix, SIGTERM
///
/// From the first call on these signals no longer end the process by themselves.
///
/// # Errors
///
/// If the handlers cannot be installed.
pub async fn stop_signal() -> io::Result<()> {
    Signals::new()?.next().await;
    Ok(())
}

/// The signals that stop a server; none is missed between two calls of `next`
#[cfg(unix)]
pub(super) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The signal that stops a server; none is missed between two calls of `next`
#[cfg(windows)]
pub(super) struct Signals(tokio::signal::windows::CtrlC);

#[cfg(windows)]
impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(tokio::signal::windows::ctrl_c()?))
    }

    pub(super) async fn next(&mut self) {
        self.0.recv().await;
    }
}
