//! `cargo xtask faults`: the table of etcd's faults, each row a test on three real members

use std::{collections::BTreeMap, ffi::OsString};

use crate::{Result, cargo, program};

/// How many rows the table has
const ROWS: usize = 26;

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
    // Over the workspace as the suite is, or cargo would choose other features and build anew.
    let ran = cargo::run_read(
        ["test", "--workspace", "--test", "faults", "--", "--ignored", AT_A_TIME],
        [("CALLSIGN_TEST_ETCD", "real"), ("CALLSIGN_REQUIRE_ETCD", "1"), ("CALLSIGN_FAULTS", form)],
        |line| rows.on_line(line),
    );
    println!("figure fault_rows_passed {}", rows.passed());
    ran?;
    if rows.passed() == ROWS { Ok(()) } else { Err(format!("{ROWS} rows were to pass").into()) }
}

/// What libtest has told of the rows
#[derive(Debug, Default)]
struct Rows(BTreeMap<u32, bool>);

impl Rows {
    /// A row with several tests passes if all of them do.
    fn on_line(&mut self, line: &str) {
        if let Some((row, passed)) = row(line) {
            *self.0.entry(row).or_insert(true) &= passed;
        }
    }

    fn passed(&self) -> usize {
        self.0.values().filter(|passed| **passed).count()
    }
}

/// `test members::row_01_the_member_dies ... ok`: 1, passed
fn row(line: &str) -> Option<(u32, bool)> {
    let (test, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let (_, name) = test.rsplit_once("row_")?;
    Some((name.get(..2)?.parse().ok()?, result == "ok"))
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
        assert_eq!((rows.passed(), rows.0.len()), (2, 3));
    }
}
