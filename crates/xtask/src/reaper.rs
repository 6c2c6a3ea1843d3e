//! Ends children whose parent was killed

use std::{
    io::Write,
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::Result;

/// Kills the children of a process that was killed itself
///
/// Drop does not run on a signal, and std has nothing that ties a child's life to its parent's. So a shell waits for
/// the end of a pipe that only we hold, whatever we die of, and then kills what is on the last line it read. Children
/// that ctrl-c has reached as well get three seconds to leave in order.
pub(crate) struct Reaper {
    shell: Child,
}

const REAPER: &str = r#"
trap '' HUP INT QUIT TERM
while read -r line; do left=$line; done
[ -n "$left" ] || exit 0
sleep 3
kill -9 $left 2>/dev/null
rm -rf -- "$1"
"#;

impl Reaper {
    pub(crate) fn start(directory: &Path) -> Result<Self> {
        let mut command = Command::new("sh");
        command.arg("-c").arg(REAPER).arg("reaper").arg(directory);
        // Without our output: whoever reads that to its end must not wait for the reaper.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let shell = command.spawn().map_err(|error| format!("sh does not start: {error}"))?;
        Ok(Self { shell })
    }

    /// These are the children now
    pub(crate) fn watch_over(&mut self, pids: impl Iterator<Item = u32>) {
        let line: Vec<_> = pids.map(|pid| pid.to_string()).collect();
        if let Some(pipe) = &mut self.shell.stdin {
            // A reaper that is gone watches over nothing; Drop still does.
            let _ = writeln!(pipe, "{}", line.join(" "));
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // Nothing is left, so it ends at once; an error means that it has already.
        let _ = self.shell.wait();
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::family::until;

    #[test]
    fn children_of_a_killed_owner_are_reaped() {
        let directory = std::env::temp_dir().join(format!("xtask-reaper-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let mut reaper = Reaper::start(&directory).unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        reaper.watch_over([child.id()].into_iter());
        // What a killed owner does: the pipe ends, and nobody has said that the child is gone.
        drop(reaper.shell.stdin.take());
        let soon = Instant::now() + Duration::from_secs(10);
        let reaped = until(soon, || matches!(child.try_wait(), Ok(Some(_))));
        let _ = child.kill();
        child.wait().unwrap();
        assert!(reaped);
        assert!(until(soon, || !directory.exists()));
    }
}
