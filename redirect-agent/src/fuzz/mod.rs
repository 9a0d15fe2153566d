//! Feeds the parsers of foreign bytes with mutations of real examples.
//!
//! Each test runs a moment under `cargo test`. For longer, or guided by coverage: CONTRIBUTING.md, "Fuzzing".

mod cni;
mod node;
mod objects;
mod requests;
mod state;

use std::{borrow::Cow, env, fmt, time::Duration};

use bolero::{Driver, ValueGenerator};
use serde::{Serialize, de::DeserializeOwned};

/// How many inputs a test takes, and how long it may take for them.
const INPUTS: usize = 5000;
const TIME: Duration = Duration::from_secs(1);
/// The most changes to one example.
const CHANGES: u8 = 6;

/// What parsers trip over.
const TOKENS: [&str; 32] = [
    "null",
    "{}",
    "[]",
    "\"",
    "\\u0000",
    "\\",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "0",
    "-1",
    "1e999",
    "18446744073709551616",
    "true",
    ",",
    ":",
    "::",
    "/",
    "../",
    "-",
    ".",
    "=",
    "!",
    ";",
    "%",
    "\n",
    " ",
    "\u{fffd}\u{1f600}",
    "\0",
];

/// Checks that a function of bytes holds for examples and their mutations.
macro_rules! fuzz {
    ($examples:expr, $target:expr) => {
        $crate::fuzz::run(bolero::check!(), $examples, $target)
    };
}
pub(crate) use fuzz;

type Target =
    bolero::TestTarget<bolero::ByteSliceGenerator, bolero::DefaultEngine, bolero::BorrowedInput>;

pub(crate) fn run<E: AsRef<[u8]>>(target: Target, examples: &[E], check: fn(&[u8])) {
    let examples: Vec<Vec<u8>> = examples.iter().map(|e| e.as_ref().to_vec()).collect();
    examples.iter().for_each(|example| check(example));
    let target = target.with_generator(Mutations(examples)).with_test_time(TIME);
    // For long runs, time alone is the limit.
    match env::var_os("BOLERO_RANDOM_TEST_TIME_MS") {
        Some(_) => target.for_each(|input| check(&input.0)),
        None => target.with_iterations(INPUTS).for_each(|input| check(&input.0)),
    }
}

/// Bytes as text, like a file's or a peer's.
pub(crate) fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// JSON that can be read is the same when it is written and read again, and an error says something.
pub(crate) fn same_again<T: Serialize + DeserializeOwned + PartialEq + fmt::Debug>(bytes: &[u8]) {
    match serde_json::from_slice::<T>(bytes) {
        Ok(read) => {
            let written = serde_json::to_string(&read).unwrap();
            match serde_json::from_str::<T>(&written) {
                Ok(again) => assert_eq!(again, read, "{written}"),
                Err(error) => panic!("{read:?} became {written}: {error}"),
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Bytes that are shown as text.
pub(crate) struct Input(Vec<u8>);

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

/// Examples with a few changes each, and sometimes bytes that resemble none.
struct Mutations(Vec<Vec<u8>>);

impl ValueGenerator for Mutations {
    type Output = Input;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Input> {
        let Some(example) = pick(driver, &self.0) else { return Some(Input(bytes(driver)?)) };
        let mut input = example.clone();
        for _ in 0..driver.produce::<u8>()? % (CHANGES + 1) {
            self.change(driver, &mut input)?;
        }
        Some(Input(input))
    }
}

impl Mutations {
    fn change<D: Driver>(&self, driver: &mut D, input: &mut Vec<u8>) -> Option<()> {
        let kind = driver.produce::<u8>()? % 9;
        let (start, end) = range(driver, input.len())?;
        match kind {
            0 => {
                let bit = driver.produce::<u8>()? % 8;
                input.get_mut(start).into_iter().for_each(|byte| *byte ^= 1 << bit);
            }
            1 => {
                let by = driver.produce::<u8>()?;
                input.get_mut(start).into_iter().for_each(|byte| *byte = by);
            }
            2 => drop(input.drain(start..end)),
            3 => input.truncate(start),
            4 => {
                let copy = input[start..end].to_vec();
                insert(input, start, &copy);
            }
            5 => insert(input, start, &bytes(driver)?),
            6 => {
                let token = usize::from(driver.produce::<u8>()?) % TOKENS.len();
                drop(input.splice(start..end, TOKENS[token].bytes()));
            }
            7 => insert(
                input,
                start,
                TOKENS[usize::from(driver.produce::<u8>()?) % TOKENS.len()].as_bytes(),
            ),
            _ => {
                // The beginning of this one, and a part of another.
                if let Some(other) = pick(driver, &self.0) {
                    let (from, to) = range(driver, other.len())?;
                    drop(input.splice(start..end, other[from..to].iter().copied()));
                }
            }
        }
        Some(())
    }
}

/// `None`: none of them.
fn pick<'a, D: Driver>(driver: &mut D, examples: &'a [Vec<u8>]) -> Option<&'a Vec<u8>> {
    examples.get(usize::from(driver.produce::<u8>()?) % (examples.len() + 1))
}

/// Positions in so many bytes, mostly near each other.
fn range<D: Driver>(driver: &mut D, length: usize) -> Option<(usize, usize)> {
    let start = usize::from(driver.produce::<u16>()?) % (length + 1);
    let far = driver.produce::<u8>()?;
    let size = if far < 200 { usize::from(far) / 10 } else { length };
    Some((start, length.min(start + size)))
}

fn bytes<D: Driver>(driver: &mut D) -> Option<Vec<u8>> {
    let length = driver.produce::<u8>()? % 40;
    (0..length).map(|_| driver.produce::<u8>()).collect()
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    drop(input.splice(at..at, bytes.iter().copied()));
}
