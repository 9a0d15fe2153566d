//! Medians, and how far they can be trusted.

use serde::Serialize;

/// How often the rounds are drawn anew.
const RESAMPLES: usize = 2000;

/// With fewer rounds an interval says little.
const ENOUGH: usize = 6;

/// A median, and the interval that 95 of 100 medians of rounds drawn at random from those measured are in
/// (percentile bootstrap).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The median of all rounds.
    pub median: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// Of how many rounds.
    pub rounds: usize,
}

impl Interval {
    /// `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let median_of_all = median(values)?;
        let mut rng = fastrand::Rng::with_seed(0);
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                let drawn: Vec<f64> =
                    values.iter().map(|_| values[rng.usize(..values.len())]).collect();
                median(&drawn)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        let (low, high) = (medians[RESAMPLES / 40], medians[RESAMPLES - 1 - RESAMPLES / 40]);
        Some(Self { median: median_of_all, low, high, rounds: values.len() })
    }

    /// Whether there are enough rounds to tell how wide it is.
    pub fn has_enough_rounds(&self) -> bool {
        self.rounds >= ENOUGH
    }

    /// Whether it is too wide to say something about a few percent.
    pub fn is_wide(&self) -> bool {
        self.high - self.low > 0.1 * self.median
    }
}

/// `None` without values.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn interval_is_around_the_median_and_as_wide_as_the_values_differ() {
        let narrow = Interval::of(&[1.0, 1.01, 0.99, 1.0, 1.0, 1.01, 0.99, 1.0]).unwrap();
        assert!(narrow.low <= narrow.median && narrow.median <= narrow.high);
        assert!(!narrow.is_wide() && narrow.has_enough_rounds(), "{narrow:?}");
        let wide = Interval::of(&[0.5, 1.5, 1.0, 0.7, 1.3, 0.6, 1.4, 1.0]).unwrap();
        assert!(wide.is_wide() && wide.has_enough_rounds(), "{wide:?}");
        let few = Interval::of(&[1.0, 1.0]).unwrap();
        assert!(!few.has_enough_rounds(), "{few:?}");
        assert_eq!(Interval::of(&[]), None);
    }
}
