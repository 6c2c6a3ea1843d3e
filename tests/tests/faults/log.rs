//! The log in an outage

use std::time::Duration;

use tokio::time::sleep;
use tracing::Level;

use crate::row::{Row, SECOND, say};

/// Interrupted and watching again, for two discoveries; unconfirmed and registered again, for one registration; gone and
/// back, for each of three sessions; and once more what a busy machine may make of it.
const LINES: usize = 24;

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn an_outage_of_60_s_is_told_once_by_each_component() {
    let Some(mut row) = Row::start("log lines, outage of 60 s").await else { return };
    let before = row.lines.at(Level::INFO).len();
    row.cluster.kill_all().await;
    sleep(Duration::from_secs(60)).await;
    let during: Vec<_> = row.lines.at(Level::INFO).split_off(before);
    row.cluster.heal().await;
    row.healed().await;
    sleep(SECOND).await;
    let all: Vec<_> = row.lines.at(Level::INFO).split_off(before);
    let told = all.iter().map(|line| format!("\n  {} {}", line.level, line.text)).collect::<String>();
    assert!(!during.is_empty(), "an outage is told");
    assert!(all.len() <= LINES, "{} lines:{told}", all.len());
    say(&format!("figure log_lines_60s_outage {}", all.len()));
    row.end().await;
}
