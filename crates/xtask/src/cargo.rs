//! Cargo as the tasks run it

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
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
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed: {status}").into()) }
}

/// The same, and hands each line of its stdout on, which is shown as well
pub(crate) fn run_read<A: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = A>,
    variables: impl IntoIterator<Item = (&'static str, impl AsRef<OsStr>)>,
    mut on_line: impl FnMut(&str),
) -> Result {
    let (mut cargo, line) = command(arguments)?;
    let mut child = cargo
        .envs(variables)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("`{line}` does not start: {error}"))?;
    // Ends when cargo and the tests have: nothing else holds the other end.
    for said in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        let said = said?;
        println!("{said}");
        on_line(&said);
    }
    let status = child.wait()?;
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
