//! `cargo xtask faults`: the table of etcd's faults, each row a test on three real members

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    thread,
};

use crate::{Result, cargo, program};

/// How many rows the table has
const ROWS: usize = 26;

/// Suites in which some tests only wait, up to a minute each: they run beside the rows and are no rows.
const WAITERS: [&str; 3] = ["session", "go_zero", "frozen"];

/// Suites of which the long form keeps the machine busy: they run when nobody elects any more.
const AFTERWARDS: [&str; 1] = ["churn"];

/// Rows wait more than they work, but each has seven processes, and an etcd that gets no time elects in vain.
const AT_A_TIME: &str = "--test-threads=4";

pub(crate) fn run(arguments: &[OsString]) -> Result {
    let form = match arguments {
        [] => "short",
        [all] if all == "--all" => "all",
        _ => return Err("usage: cargo xtask faults [--all]".into()),
    };
    for needed in ["etcd", "etcdctl"] {
        program::on_path(needed)
            .ok_or_else(|| format!("the fault table needs real members: there is no {needed} on PATH"))?;
    }
    let mut rows = Rows::default();
    let (ran, waited) = thread::scope(|scope| {
        let waiting = scope.spawn(|| ignored(&WAITERS, form, |_| {}).map_err(|error| error.to_string()));
        let ran = ignored(&["faults"], form, |line| rows.on_line(line));
        (ran, waiting.join().expect("errors are returned"))
    });
    println!("figure fault_rows_passed {}", rows.passed());
    ran?;
    waited?;
    ignored(&AFTERWARDS, form, |_| {})?;
    let left_out = ROWS - rows.passed();
    if left_out == rows.skipped.len() {
        Ok(())
    } else {
        Err(format!("{left_out} of {ROWS} rows did not pass").into())
    }
}

/// Runs what these suites leave out elsewhere
fn ignored(suites: &[&'static str], form: &'static str, on_line: impl FnMut(&str)) -> Result {
    let suites = suites.iter().flat_map(|suite| ["--test", suite]);
    // Over the workspace as the suite is, or cargo would choose other features and build anew.
    let line = ["test", "--workspace"].into_iter().chain(suites).chain(["--", "--ignored", AT_A_TIME]);
    let variables =
        [("CALLSIGN_TEST_ETCD", "real"), ("CALLSIGN_REQUIRE_ETCD", "1"), ("CALLSIGN_FAULTS", form)];
    cargo::run_read(line, variables, on_line)
}

/// What libtest and the rows themselves have told
#[derive(Debug, Default)]
struct Rows {
    passed: BTreeMap<u32, bool>,
    /// Where this machine does not allow the fault
    skipped: BTreeSet<u32>,
}

impl Rows {
    /// A row with several tests passes if all of them do.
    fn on_line(&mut self, line: &str) {
        if let Some((row, passed)) = row(line) {
            *self.passed.entry(row).or_insert(true) &= passed;
        }
        self.skipped.extend(skipped(line));
    }

    /// How many have passed, without those that only did because they were skipped
    fn passed(&self) -> usize {
        let passed = |(row, passed): (&u32, &bool)| *passed && !self.skipped.contains(row);
        self.passed.iter().filter(|row| passed(*row)).count()
    }
}

/// `test members::row_01_the_member_dies ... ok`: 1, passed
fn row(line: &str) -> Option<(u32, bool)> {
    let (test, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let (_, name) = test.rsplit_once("row_")?;
    Some((name.get(..2)?.parse().ok()?, result == "ok"))
}

/// `row 23, name resolution: skipped, no mount namespace`: 23
fn skipped(line: &str) -> Option<u32> {
    let (row, _) = line.strip_prefix("row ")?.split_once(", ")?;
    line.contains(": skipped").then(|| row.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_passes_once_and_only_if_all_its_tests_do() {
        let mut rows = Rows::default();
        for line in [
            "test members::row_01_the_member_dies ... ok",
            "test store::row_14_with_an_id ... ok",
            "test store::row_14_without ... FAILED",
            "test store::row_15_x ... ok",
            "test store::row_15_y ... ok",
            "test log::an_outage_is_told ... ok",
            "row 01, the member dies: 10 calls",
            "test result: ok. 5 passed",
        ] {
            rows.on_line(line);
        }
        assert_eq!((rows.passed(), rows.passed.len()), (2, 3));
        rows.on_line("row 15, x: skipped, not here");
        assert_eq!((rows.passed(), rows.skipped.len()), (1, 1));
    }
}
