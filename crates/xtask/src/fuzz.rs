//! `cargo xtask fuzz`: random bad input for everything that reads what others wrote

use std::{
    env,
    hash::{BuildHasher, RandomState},
};

use crate::{Result, cargo};

const INPUTS: &str = "CALLSIGN_FUZZ_INPUTS";
const SEED: &str = "CALLSIGN_FUZZ_SEED";

/// For each reader; the unit tests make 20 000, the same each time.
const MANY: u64 = 1_000_000;

pub(crate) fn run() -> Result {
    let inputs = number(INPUTS)?.unwrap_or(MANY).to_string();
    let seed = number(SEED)?.unwrap_or_else(random).to_string();
    println!("== {inputs} inputs for each reader, {SEED}={seed}");
    let mut total = 0;
    let tests = ["test", "--package", "callsign", "--lib", "fuzz::", "--", "--nocapture"];
    cargo::run_read(tests, [(INPUTS, &*inputs), (SEED, &*seed)], |line| total += fuzzed(line))?;
    if total == 0 {
        return Err("no reader was fuzzed".into());
    }
    println!("figure fuzz_inputs {total}");
    Ok(())
}

fn number(name: &str) -> Result<Option<u64>> {
    match env::var(name) {
        Ok(value) => {
            let number = value.parse().map_err(|_| format!("{name} is a number, not {value:?}"))?;
            Ok(Some(number))
        }
        Err(env::VarError::NotPresent) => Ok(None),
        Err(error) => Err(format!("{name}: {error}").into()),
    }
}

/// Other inputs each time; the standard library has no other source
fn random() -> u64 {
    RandomState::new().hash_one(())
}

/// How many inputs a reader had, if the line says so: `fuzzed READER INPUTS`, perhaps behind the name of the test
fn fuzzed(line: &str) -> u64 {
    let said = line.split_once("fuzzed ").and_then(|(_, said)| said.split_once(' '));
    said.and_then(|(_, inputs)| inputs.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reader_had_is_counted() {
        assert_eq!(fuzzed("fuzzed value 20000"), 20_000);
        assert_eq!(fuzzed("test etcd::fuzz::any_key ... fuzzed key 7"), 7);
        assert_eq!(fuzzed("test etcd::fuzz::any_key ... ok"), 0);
    }
}
