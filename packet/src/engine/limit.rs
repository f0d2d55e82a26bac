//! So many a second.

use crate::time::BootTime;

/// A token bucket that holds the tokens of a quarter of a second.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    per_second: u64,
    /// In billionths of a token.
    level: u64,
    filled_at: BootTime,
}

const TOKEN: u64 = 1_000_000_000;

impl Limit {
    /// At most `per_second` a second; 0 permits none.
    pub(crate) fn new(per_second: u32) -> Limit {
        let per_second = u64::from(per_second);
        Limit { per_second, level: Self::room(per_second), filled_at: BootTime(0) }
    }

    fn fill(&mut self, now: BootTime) {
        let passed = now.0.saturating_sub(self.filled_at.0);
        self.filled_at = self.filled_at.max(now);
        self.level = self
            .level
            .saturating_add(passed.saturating_mul(self.per_second))
            .min(Self::room(self.per_second));
    }

    /// How many there are.
    pub(crate) fn available(&mut self, now: BootTime) -> u64 {
        self.fill(now);
        self.level / TOKEN
    }

    /// Takes one that was given away before, whether it is there or not.
    pub(crate) fn spend(&mut self, now: BootTime) {
        self.fill(now);
        self.level = self.level.saturating_sub(TOKEN);
    }

    /// Takes one, if there is one.
    #[inline]
    pub(crate) fn take(&mut self, now: BootTime) -> bool {
        self.fill(now);
        if self.level < TOKEN {
            return false;
        }
        self.level -= TOKEN;
        true
    }

    fn room(per_second: u64) -> u64 {
        if per_second == 0 { 0 } else { (per_second * TOKEN / 4).max(TOKEN) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_sees_more_than_its_share_and_the_bucket() {
        let mut limit = Limit::new(100);
        let taken = (0..10_000).filter(|i| limit.take(BootTime(i * 100_000))).count();
        assert!((100..=126).contains(&taken), "{taken}");
        assert!(!Limit::new(0).take(BootTime(5 * TOKEN)));
    }

    #[test]
    fn what_was_given_away_before_is_missing_afterwards() {
        let mut limit = Limit::new(100);
        let now = BootTime(TOKEN);
        assert_eq!(limit.available(now), 25);
        (0..30).for_each(|_| limit.spend(now));
        assert_eq!(limit.available(now), 0);
        assert!(!limit.take(now) && limit.take(BootTime(now.0 + TOKEN / 100)));
    }

    #[test]
    fn time_that_stands_still_or_goes_back_gives_nothing() {
        let mut limit = Limit::new(4);
        assert!(limit.take(BootTime(10 * TOKEN)));
        assert!(!limit.take(BootTime(10 * TOKEN)) && !limit.take(BootTime(9 * TOKEN)));
        assert!(limit.take(BootTime(10 * TOKEN + TOKEN / 4)));
    }
}
