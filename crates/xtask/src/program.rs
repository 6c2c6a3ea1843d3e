//! Programs on PATH, and the protobuf compiler that the builds need

use std::{
    env::{self, consts::EXE_SUFFIX},
    ffi::OsStr,
    path::{Path, PathBuf},
};

use crate::Result;

/// The protobuf compiler: `PROTOC`, else on PATH, else the bundled one
pub(crate) fn protoc() -> Result<PathBuf> {
    if let Some(chosen) = env::var_os("PROTOC") {
        return Ok(chosen.into());
    }
    if let Some(installed) = on_path("protoc") {
        return Ok(installed);
    }
    protoc_bin_vendored::protoc_bin_path().map_err(|error| {
        format!("no protoc on PATH, and no bundled one: {error}; install protobuf-compiler").into()
    })
}

/// The first executable of that name in the directories of PATH
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    find(&env::var_os("PATH")?, name)
}

fn find(path: &OsStr, name: &str) -> Option<PathBuf> {
    env::split_paths(path)
        .map(|directory| directory.join(format!("{name}{EXE_SUFFIX}")))
        .find(|program| is_executable(program))
}

#[cfg(unix)]
fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;

    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_executable(path: &Path) -> bool {
    path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn programs_are_found_in_the_order_of_path() {
        assert_eq!(find(OsStr::new("/nowhere:/bin:/usr/bin"), "sh"), Some(PathBuf::from("/bin/sh")));
        assert_eq!(find(OsStr::new("/nowhere"), "sh"), None);
        assert_eq!(find(OsStr::new(""), "sh"), None);
    }

    #[test]
    #[cfg(unix)]
    fn files_that_cannot_be_run_are_no_programs() {
        assert_eq!(find(OsStr::new(env!("CARGO_MANIFEST_DIR")), "Cargo.toml"), None);
        assert_eq!(find(OsStr::new("/"), "tmp"), None);
    }

    #[test]
    fn a_protoc_comes_with_the_project() {
        let bundled = protoc_bin_vendored::protoc_bin_path().unwrap();
        assert!(is_executable(&bundled), "{}", bundled.display());
    }
}
