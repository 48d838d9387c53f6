//! Medians of ratios with confidence intervals.
//!
//! A machine drifts (other guests, clocks, caches), but measurements of the same round drift
//! together. Every round gives one ratio. The result is the median of all rounds with a bootstrap
//! interval: the rounds are drawn many times with replacement, and the interval is the middle 95 %
//! of the medians.

use serde::Serialize;

/// Number of bootstrap draws; enough for stable third digits of the bounds.
const RESAMPLES: usize = 4_000;
/// Share of draws outside the interval on each side.
const TAIL: f64 = 0.025;
/// Fixed, so that the same rounds give the same interval.
const SEED: u64 = 0x5eed;

/// A median with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Estimate {
    /// Estimates the median of the samples; `None` if there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let middle = median(samples)?;
        let mut random = Random::new(SEED);
        let mut draw = vec![0.0; samples.len()];
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                draw.fill_with(|| samples[random.below(samples.len())]);
                middle_of(&mut draw)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        let at = |share: f64| medians[((RESAMPLES - 1) as f64 * share).round() as usize];
        Some(Self { median: middle, low: at(TAIL), high: at(1.0 - TAIL) })
    }

    /// Estimates the median of `value / baseline` by round; ignores rounds that lack one of them.
    pub fn of_ratio(values: &[Option<f64>], baselines: &[Option<f64>]) -> Option<Self> {
        let ratios: Vec<f64> = values
            .iter()
            .zip(baselines)
            .filter_map(|(values, baselines)| Some((*values)? / (*baselines)?))
            .collect();
        Self::of(&ratios)
    }
}

/// Returns the middle value, or the mean of the two middle ones.
pub fn median(samples: &[f64]) -> Option<f64> {
    if samples.is_empty() {
        return None;
    }
    Some(middle_of(&mut samples.to_vec()))
}

fn middle_of(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    let half = samples.len() / 2;
    if samples.len() % 2 == 1 { samples[half] } else { f64::midpoint(samples[half - 1], samples[half]) }
}

/// `SplitMix64`, a small random number generator.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number in `0..end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// Shuffles the items; every order is equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_value_or_the_mean_of_the_two_middle_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn equal_samples_give_an_interval_of_width_zero() {
        let estimate = Estimate::of(&[1.5; 9]).expect("nine samples");
        assert_eq!(estimate, Estimate { median: 1.5, low: 1.5, high: 1.5 });
    }

    #[test]
    fn interval_contains_the_median_and_is_within_the_samples() {
        let samples: Vec<f64> = (0..21).map(|n| 1.0 + f64::from(n) / 100.0).collect();
        let estimate = Estimate::of(&samples).expect("samples");
        assert!((estimate.median - 1.10).abs() < 1e-9);
        assert!(estimate.low > 1.0 && estimate.low < estimate.median);
        assert!(estimate.high < 1.2 && estimate.high > estimate.median);
    }

    #[test]
    fn more_rounds_narrow_the_interval() {
        let mut random = Random::new(7);
        let mut noisy = |count| -> Vec<f64> { (0..count).map(|_| random.below(1_000) as f64).collect() };
        let width = |samples: &[f64]| Estimate::of(samples).map(|estimate| estimate.high - estimate.low);
        assert!(width(&noisy(400)) < width(&noisy(10)));
    }

    /// The true median of a uniform 0..1000 is 499.5: about 95 of 100 intervals must contain it.
    #[test]
    fn interval_contains_the_true_median_in_95_percent() {
        let mut random = Random::new(1);
        let covered = (0..200)
            .filter(|_| {
                let samples: Vec<f64> = (0..25).map(|_| random.below(1_000) as f64).collect();
                Estimate::of(&samples).is_some_and(|found| found.low <= 499.5 && 499.5 <= found.high)
            })
            .count();
        assert!((180..=200).contains(&covered), "{covered} of 200 intervals contain the true median");
    }

    #[test]
    fn drift_of_a_round_does_not_change_the_ratio() {
        let baselines: Vec<Option<f64>> = (1..=10).map(|round| Some(f64::from(round) * 1_000.0)).collect();
        let values: Vec<Option<f64>> = baselines.iter().map(|rate| rate.map(|rate| rate * 1.2)).collect();
        let ratio = Estimate::of_ratio(&values, &baselines).expect("ten rounds");
        assert!((ratio.low - 1.2).abs() < 1e-9 && (ratio.high - 1.2).abs() < 1e-9);
    }

    #[test]
    fn failed_rounds_are_ignored() {
        let ratio = Estimate::of_ratio(&[Some(2.0), None, Some(9.0)], &[Some(1.0), Some(1.0), None]);
        assert_eq!(ratio.map(|ratio| ratio.median), Some(2.0));
        assert_eq!(Estimate::of_ratio(&[None], &[Some(1.0)]), None);
    }

    #[test]
    fn shuffle_keeps_every_item_and_changes_the_order() {
        let mut items: Vec<u32> = (0..50).collect();
        Random::new(3).shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
