//! Samples, and how figures are printed.

use std::time::Duration;

/// Measured values of one thing.
#[derive(Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a time, in microseconds.
    pub fn time(&mut self, time: Duration) {
        self.value(time.as_secs_f64() * 1e6);
    }

    /// Adds a value.
    pub fn value(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value that `percent` of all do not exceed; NaN without any.
    pub fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
        sorted.get(rank).copied().unwrap_or(f64::NAN)
    }

    /// The median.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// Prints the samples in `unit`, of which a microsecond has `scale`.
    pub fn print(&self, what: &str, unit: &str, scale: f64) {
        let [least, p50, p99] = [1, 50, 99].map(|percent| self.percentile(percent) * scale);
        let count = self.0.len();
        println!("  {what:<46} p50 {p50:9.2} {unit}  p99 {p99:9.2}  least {least:9.2}  (n={count})");
    }
}

/// Prints `ours / reference` beside the most that it may be.
pub fn ratio(what: &str, ours: f64, reference: f64, most: f64) {
    let ratio = ours / reference;
    println!("  {what:<46} {ratio:13.2}     goal: at most {most:.2}: {}", judge(ratio <= most));
}

/// Prints `ours / reference` beside the least that it may be.
pub fn at_least(what: &str, ours: f64, reference: f64, least: f64) {
    let ratio = ours / reference;
    println!("  {what:<46} {ratio:13.2}     goal: at least {least:.2}: {}", judge(ratio >= least));
}

/// Prints a value beside the most that it may be.
pub fn limit(what: &str, value: f64, most: f64, unit: &str) {
    println!("  {what:<46} {value:13.2} {unit}  goal: at most {most}: {}", judge(value <= most));
}

fn judge(met: bool) -> &'static str {
    if met { "met" } else { "NOT MET" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan());
        (1..=100).rev().for_each(|n| samples.value(f64::from(n)));
        assert_eq!([1, 50, 99, 100].map(|p| samples.percentile(p)), [1.0, 50.0, 99.0, 100.0]);
        let mut one = Samples::default();
        one.time(Duration::from_millis(2));
        assert_eq!(one.percentile(99), 2000.0);
    }
}
