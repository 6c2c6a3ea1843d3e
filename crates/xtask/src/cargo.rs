//! Cargo as the tasks run it

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
};

use crate::{Result, program};

/// Runs cargo with `PROTOC` set and fails if it does
pub(crate) fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result {
    run_with(arguments, [])
}

/// The same with these variables in its environment
pub(crate) fn run_with<A: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = A>,
    variables: impl IntoIterator<Item = (&'static str, &'static str)>,
) -> Result {
    let (mut cargo, line) = command(arguments)?;
    let status =
        cargo.envs(variables).status().map_err(|error| format!("`{line}` does not start: {error}"))?;
    ended(&line, status)
}

/// The same, and each line of its output is read as it comes
pub(crate) fn run_read<A: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = A>,
    variables: impl IntoIterator<Item = (&'static str, &'static str)>,
    mut on_line: impl FnMut(&str),
) -> Result {
    let (mut cargo, line) = command(arguments)?;
    let spawned = cargo.envs(variables).stdout(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("`{line}` does not start: {error}"))?;
    let output = child.stdout.take().ok_or("its output is piped")?;
    for output in BufReader::new(output).split(b'\n') {
        on_line(&String::from_utf8_lossy(&output?));
    }
    ended(&line, child.wait()?)
}

fn ended(line: &str, status: ExitStatus) -> Result {
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed: {status}").into()) }
}

/// The same for a program that a person stops: this process becomes cargo, so ctrl-c is the program's affair alone
#[cfg(unix)]
pub(crate) fn hand_over<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result {
    use std::os::unix::process::CommandExt;

    let (mut cargo, line) = command(arguments)?;
    Err(format!("`{line}` does not start: {}", cargo.exec()).into())
}

#[cfg(not(unix))]
pub(crate) fn hand_over<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result {
    run(arguments)
}

/// Cargo with `PROTOC` set, and its line, which was shown
fn command<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<(Command, String)> {
    // `CARGO` is the cargo that runs us: the same toolchain.
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    cargo.args(arguments).env("PROTOC", program::protoc()?);
    let line = shown(&cargo);
    eprintln!("$ {line}");
    Ok((cargo, line))
}

/// A program that `cargo build` has put beside this one
pub(crate) fn built(name: &str) -> Result<PathBuf> {
    let program = env::current_exe()?.with_file_name(format!("{name}{}", env::consts::EXE_SUFFIX));
    if !program.is_file() {
        return Err(format!("{} was not built; run xtask as `cargo xtask`", program.display()).into());
    }
    Ok(program)
}

fn shown(cargo: &Command) -> String {
    let arguments = cargo.get_args().map(OsStr::to_string_lossy);
    ["cargo".into()].into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
}
