//! A latency histogram with buckets 0.4 % wide: constant memory, constant time to record.

use std::time::Duration;

use super::Latency;

/// Buckets per doubling.
const STEPS: u32 = 256;
/// Number of doublings from a nanosecond to 18 minutes.
const OCTAVES: u32 = 40;

/// A histogram of latencies.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; (OCTAVES * STEPS) as usize], count: 0, max: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket_of(nanos).min(self.buckets.len() - 1);
        self.buckets[bucket] += 1;
        self.count += 1;
        self.max = self.max.max(nanos);
    }

    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Returns the latency in microseconds that `share` of all operations did not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        let wanted = (self.count as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return (upper_end(bucket).min(self.max) as f64) / 1_000.0;
            }
        }
        0.0
    }

    pub fn latency(&self) -> Latency {
        Latency {
            p50: self.quantile(0.50),
            p90: self.quantile(0.90),
            p99: self.quantile(0.99),
            max: self.max as f64 / 1_000.0,
        }
    }
}

/// Below `STEPS` a bucket is one nanosecond; above, the eight bits after the leading one select it.
const fn bucket_of(nanos: u64) -> usize {
    let steps = STEPS as u64;
    if nanos < steps {
        return nanos as usize;
    }
    let shift = nanos.ilog2() - STEPS.ilog2();
    (shift as u64 * steps + (nanos >> shift)) as usize
}

/// Returns the largest value of a bucket.
const fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let steps = STEPS as u64;
    if bucket < 2 * steps {
        return bucket;
    }
    let shift = bucket / steps - 1;
    ((bucket % steps + steps + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_within_half_a_percent() {
        let mut nanos = 1_u64;
        while nanos < 1 << 40 {
            let end = upper_end(bucket_of(nanos));
            assert!(end >= nanos && (end - nanos) as f64 <= nanos as f64 / 255.0, "{nanos} reads as {end}");
            assert_eq!(bucket_of(end), bucket_of(nanos));
            assert_eq!(bucket_of(end + 1), bucket_of(nanos) + 1);
            nanos += nanos / 7 + 1;
        }
    }

    #[test]
    fn quantiles_are_those_of_the_samples() {
        let mut histogram = Histogram::default();
        for micros in 1..=1_000 {
            histogram.record(Duration::from_micros(micros));
        }
        let latency = histogram.latency();
        assert_eq!(histogram.count(), 1_000);
        assert!((latency.p50 - 500.0).abs() < 500.0 * 0.005, "{latency:?}");
        assert!((latency.p99 - 990.0).abs() < 990.0 * 0.005, "{latency:?}");
        assert!((latency.max - 1_000.0).abs() < f64::EPSILON, "{latency:?}");
    }
}
