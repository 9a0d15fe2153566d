//! Draws from bytes, for tests with generated inputs.

use core::time::Duration;

/// How many inputs a test takes, unless it is told how much time.
const INPUTS: usize = 20_000;
/// A longer one says nothing more.
const LONGEST: usize = 400;

/// Bytes that choices are drawn from. When they run out, the first choice is taken.
pub struct Draw<'a>(&'a [u8]);

impl Draw<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn word(&mut self) -> u32 {
        u32::from_ne_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    pub fn yes(&mut self) -> bool {
        self.byte() % 2 == 1
    }

    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

type Target =
    bolero::TestTarget<bolero::ByteSliceGenerator, bolero::DefaultEngine, bolero::BorrowedInput>;

/// Calls `check` for many inputs. `cargo bolero` finds those that reach something new.
pub fn each(target: Target, at_most: Duration, check: fn(&mut Draw)) {
    let bytes = bolero::produce::<Vec<u8>>().with().len(0_usize..=LONGEST);
    let target = target.with_generator(bytes).with_test_time(at_most);
    match std::env::var_os("BOLERO_RANDOM_TEST_TIME_MS") {
        Some(_) => target.for_each(|bytes| check(&mut Draw(bytes))),
        None => target.with_iterations(INPUTS).for_each(|bytes| check(&mut Draw(bytes))),
    }
}
