//! Child processes that end when this process does, however it ends

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{self, Child, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{Result, reaper::Reaper};

/// The children of one task and the temporary directory with their logs
///
/// Dropped, it kills the children and removes the directory. If this process cannot do that because it was killed
/// itself, the [`Reaper`] does.
pub(crate) struct Family {
    directory: PathBuf,
    keep: bool,
    children: Vec<(Id, Child)>,
    reaper: Option<Reaper>,
}

/// One child of a [`Family`]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Id(u32);

impl Family {
    /// An empty family with a fresh directory
    pub(crate) fn new(name: &str) -> Result<Self> {
        let directory = fresh_directory(name)?;
        let reaper = if cfg!(unix) { Some(Reaper::start(&directory)?) } else { None };
        Ok(Self { directory, keep: false, children: Vec::new(), reaper })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Leaves the directory on disk, for someone who wants to read the logs
    pub(crate) fn keep_directory(&mut self) {
        self.keep = true;
    }

    /// Starts a child whose errors, and whose output unless the command says otherwise, go to a log in the directory
    pub(crate) fn spawn(&mut self, name: &str, command: &mut process::Command) -> Result<Id> {
        let log = File::options().create(true).append(true).open(self.log_of(name))?;
        self.spawn_with(command.stdout(log.try_clone()?).stderr(log))
    }

    /// Starts a child as the command says
    pub(crate) fn spawn_with(&mut self, command: &mut process::Command) -> Result<Id> {
        let program = command.get_program().to_owned();
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| format!("{} does not start: {error}", program.display()))?;
        let id = Id(child.id());
        self.children.push((id, child));
        self.tell_reaper();
        Ok(id)
    }

    /// The child itself; `None` once it was killed or stopped
    pub(crate) fn child(&mut self, id: Id) -> Option<&mut Child> {
        self.children.iter_mut().find(|(candidate, _)| *candidate == id).map(|(_, child)| child)
    }

    /// SIGKILL; returns when the child is gone
    pub(crate) fn kill(&mut self, id: Id) {
        if let Some(position) = self.children.iter().position(|(candidate, _)| *candidate == id) {
            end(&mut self.children[position].1);
            self.children.remove(position);
            self.tell_reaper();
        }
    }

    /// SIGTERM to all of them; those that have not ended by themselves in time are killed
    pub(crate) fn stop(&mut self, ids: &[Id], within: Duration) {
        for id in ids {
            terminate(*id);
        }
        let deadline = Instant::now() + within;
        for id in ids {
            until(deadline, || self.child(*id).is_none_or(|child| !is_running(child)));
            self.kill(*id);
        }
    }

    /// Waits for the end of a child
    pub(crate) fn wait(&mut self, id: Id, deadline: Instant) -> Option<ExitStatus> {
        let child = self.child(id)?;
        until(deadline, || !is_running(child));
        let status = child.try_wait().ok().flatten();
        self.kill(id);
        status
    }

    pub(crate) fn log_of(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    fn tell_reaper(&mut self) {
        if let Some(reaper) = &mut self.reaper {
            reaper.watch_over(self.children.iter().map(|(Id(pid), _)| *pid));
        }
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        // The last one started uses the others.
        for (_, child) in self.children.iter_mut().rev() {
            end(child);
        }
        self.children.clear();
        self.tell_reaper();
        if self.keep {
            eprintln!("logs: {}", self.directory.display());
        } else if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("{} stays: {error}", self.directory.display());
        }
    }
}

/// Polls a condition until it holds; whether it did before the deadline
#[expect(clippy::disallowed_methods, reason = "there is no runtime here whose worker it could block")]
pub(crate) fn until(deadline: Instant, mut condition: impl FnMut() -> bool) -> bool {
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn is_running(child: &mut Child) -> bool {
    matches!(child.try_wait(), Ok(None))
}

fn end(child: &mut Child) {
    // Both fail only for a child that has ended and was waited for.
    let _ = child.kill();
    let _ = child.wait();
}

/// std can only SIGKILL, and /bin/kill is not everywhere: the shell's own `kill` is
fn terminate(Id(pid): Id) {
    if cfg!(unix) {
        // Who cannot be told is killed afterwards.
        let _ = process::Command::new("sh")
            .arg("-c")
            .arg("kill -TERM \"$1\"")
            .arg("kill")
            .arg(pid.to_string())
            .status();
    }
}

fn fresh_directory(name: &str) -> Result<PathBuf> {
    let parent = std::env::temp_dir();
    for attempt in 0..100 {
        let directory = parent.join(format!("{name}-{}-{attempt}", process::id()));
        match fs::create_dir(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(format!("{} cannot be made: {error}", directory.display()).into()),
        }
    }
    Err(format!("{} is full of {name} directories", parent.display()).into())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn sleeper() -> process::Command {
        let mut command = process::Command::new("sleep");
        command.arg("60");
        command
    }

    fn lives(Id(pid): Id) -> bool {
        let probe = format!("kill -0 {pid} 2>/dev/null");
        process::Command::new("sh").arg("-c").arg(probe).status().is_ok_and(|status| status.success())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_dropped_family_leaves_no_process_and_no_directory() {
        // A name of its own: another test would make the same directory again before it is looked for.
        let mut family = Family::new("xtask-test-dropped").unwrap();
        let directory = family.directory().to_owned();
        let ids = [family.spawn("a", &mut sleeper()).unwrap(), family.spawn("b", &mut sleeper()).unwrap()];
        assert!(ids.into_iter().all(lives));
        assert!(directory.join("a.log").exists());
        drop(family);
        assert!(!ids.into_iter().any(lives));
        assert!(!directory.exists());
    }

    #[test]
    fn a_killed_child_is_forgotten() {
        let mut family = Family::new("xtask-test").unwrap();
        let id = family.spawn("a", &mut sleeper()).unwrap();
        family.kill(id);
        assert!(!lives(id));
        assert!(family.child(id).is_none());
    }

    #[test]
    fn a_stopped_child_can_leave_in_order() {
        let mut family = Family::new("xtask-test").unwrap();
        let script = "trap 'echo left; exit' TERM; echo up; while :; do sleep 0.01; done";
        let id = family.spawn("a", process::Command::new("sh").arg("-c").arg(script)).unwrap();
        let log = family.log_of("a");
        assert!(until(soon(), || fs::read_to_string(&log).unwrap() == "up\n"));
        family.stop(&[id], Duration::from_secs(10));
        assert_eq!(fs::read_to_string(&log).unwrap(), "up\nleft\n");
    }

    #[test]
    fn a_child_that_ignores_sigterm_is_killed() {
        let mut family = Family::new("xtask-test").unwrap();
        let script = "trap '' TERM; echo up; while :; do sleep 0.01; done";
        let id = family.spawn("a", process::Command::new("sh").arg("-c").arg(script)).unwrap();
        let log = family.log_of("a");
        assert!(until(soon(), || fs::read_to_string(&log).unwrap() == "up\n"));
        family.stop(&[id], Duration::from_millis(50));
        assert!(!lives(id));
    }
}
