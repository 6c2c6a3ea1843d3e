//! Random bad input for everything that reads what others wrote
//!
//! Each reader has a property beside it, in a `fuzz.rs` of its module, and a few samples to begin with. 20 000 inputs each
//! and the same in every run of the tests; `cargo xtask fuzz` makes more of them, others every time. `CALLSIGN_FUZZ_INPUTS`
//! and `CALLSIGN_FUZZ_SEED` say how many and which. An input that breaks a property is printed with its seed.

mod mutate;

use std::{env, fmt};

use fastrand::Rng;

use self::mutate::Mutator;

const INPUTS: u64 = 20_000;

/// Hands mutations of the samples to `property`, which panics when one breaks it
pub(crate) fn run<S: AsRef<[u8]>>(reader: &str, samples: &[S], mut property: impl FnMut(&[u8])) {
    let inputs = variable("CALLSIGN_FUZZ_INPUTS").unwrap_or(INPUTS);
    let seed = variable("CALLSIGN_FUZZ_SEED").unwrap_or(0);
    // Each reader its own: what one adds or leaves out moves no other.
    let own = reader.bytes().fold(seed, |seed, byte| seed.rotate_left(8) ^ u64::from(byte));
    let mut mutator = Mutator::new(Rng::with_seed(own), samples);
    for number in 0..inputs {
        let input = mutator.input(number);
        let _shown = Tried { reader, seed, number, input };
        property(input);
    }
    // `cargo xtask fuzz` adds these up.
    println!("fuzzed {reader} {inputs}");
}

fn variable(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Shows the input if its property panics
struct Tried<'a> {
    reader: &'a str,
    seed: u64,
    number: u64,
    input: &'a [u8],
}

impl Drop for Tried<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { reader, seed, number, input } = self;
            eprintln!("CALLSIGN_FUZZ_SEED={seed}: input {number} of {reader}: b\"{}\"", input.escape_ascii());
        }
    }
}

/// Asserts that an error's text can be logged: one short line
pub(crate) fn assert_one_line(error: &impl fmt::Display, longest: usize) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.chars().any(char::is_control), "control characters: {text:?}");
    assert!(text.len() <= longest, "{} bytes: {text}", text.len());
}

/// In no sample and no token
pub(crate) const PASSWORD: &str = "pa55w0rd";

/// The input as a URL with [`PASSWORD`] in it
pub(crate) fn with_password(input: &str) -> String {
    let (scheme, rest) = input.split_once("://").unwrap_or(("http", input));
    let slash = if rest.starts_with('/') { "/" } else { "" };
    format!("{scheme}://{slash}root:{PASSWORD}@{}", rest.strip_prefix('/').unwrap_or(rest))
}

/// Asserts that an error says nothing of the password
pub(crate) fn assert_secret(error: &(impl fmt::Display + fmt::Debug)) {
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains(PASSWORD), "{shown}");
}
