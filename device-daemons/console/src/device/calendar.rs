//! Dates of the proleptic Gregorian calendar in UTC, without leap seconds, and alarm times.

/// One second in nanoseconds.
pub const SECOND: i128 = 1_000_000_000;
const DAY_SECONDS: i128 = 86_400;
/// Days of 400 years.
const ERA_DAYS: i128 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i128 = 719_468;

/// A date and a time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    /// Year with its century.
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

/// A value that its computation bounds to a byte.
fn small(value: i128) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

/// The last two digits of a number, of which a century's register shows no more.
#[must_use]
pub fn two_digits(value: i64) -> u8 {
    small(i128::from(value.rem_euclid(100)))
}

/// Day of the week, 1 for Sunday, of a time in seconds since 1970.
#[must_use]
pub fn weekday(seconds: i128) -> u8 {
    // 1970-01-01 was a Thursday.
    small((seconds.div_euclid(DAY_SECONDS) + 4).rem_euclid(7) + 1)
}

impl DateTime {
    /// The date and time `seconds` after 1970-01-01 00:00:00.
    #[must_use]
    pub fn at(seconds: i128) -> Self {
        let (days, time) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
        let days = days + EPOCH_DAYS;
        let (era, day) = (days.div_euclid(ERA_DAYS), days.rem_euclid(ERA_DAYS));
        // Years begin in March here, so that the leap day is the last of its year.
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + i128::from(month <= 2);
        Self {
            year: i64::try_from(year).unwrap_or(0),
            month: small(month),
            day: small(day),
            hour: small(time / 3600),
            minute: small(time / 60 % 60),
            second: small(time % 60),
        }
    }

    /// Seconds since 1970-01-01 00:00:00. Fields out of their range count on, the month is clamped.
    #[must_use]
    pub fn seconds(&self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = if month <= 2 { self.year - 1 } else { self.year };
        let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
        let march = if month > 2 { month - 3 } else { month + 9 };
        let day = (153 * march + 2) / 5 + i64::from(self.day) - 1 + year * 365 + year / 4 - year / 100;
        let days = era * 146_097 + day - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// A time of day; `None` matches every value of a field.
#[derive(Clone, Copy, Debug)]
pub struct Alarm {
    /// Hour.
    pub hour: Option<i128>,
    /// Minute.
    pub minute: Option<i128>,
    /// Second.
    pub second: Option<i128>,
}

impl Alarm {
    /// The first second after `seconds` that matches, if any does.
    #[must_use]
    pub fn first_after(&self, seconds: i128) -> Option<i128> {
        let misses = |field: Option<i128>, value: i128| field.is_some_and(|f| f != value);
        let mut at = seconds + 1;
        let end = at + DAY_SECONDS;
        // Each step skips a whole hour, minute or second: at most 24 + 60 + 60 steps to a match.
        while at < end {
            let time = at.rem_euclid(DAY_SECONDS);
            if misses(self.hour, time / 3600) {
                at += 3600 - time % 3600;
            } else if misses(self.minute, time / 60 % 60) {
                at += 60 - time % 60;
            } else if misses(self.second, time % 60) {
                if self.second.is_some_and(|s| s > 59) {
                    return None;
                }
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        for (seconds, text) in [
            (0, "1970-1-1 0:0:0"),
            (951_782_400, "2000-2-29 0:0:0"),
            (951_868_799, "2000-2-29 23:59:59"),
            (4_107_542_400, "2100-3-1 0:0:0"),
            (1_763_865_682, "2025-11-23 2:41:22"),
            (-1, "1969-12-31 23:59:59"),
        ] {
            let t = DateTime::at(seconds);
            let shown = format!("{}-{}-{} {}:{}:{}", t.year, t.month, t.day, t.hour, t.minute, t.second);
            assert_eq!(shown, text);
            assert_eq!(i128::from(t.seconds()), seconds);
        }
        assert_eq!(weekday(0), 5);
        assert_eq!(weekday(951_782_400), 3, "2000-02-29 was a Tuesday");
    }

    #[test]
    fn every_day_of_nine_centuries_goes_both_ways() {
        for day in -200_000..130_000i128 {
            let t = DateTime::at(day * DAY_SECONDS + 12_345);
            assert_eq!(i128::from(t.seconds()), day * DAY_SECONDS + 12_345);
        }
    }

    #[test]
    fn alarms_are_found_in_a_day_or_never() {
        let alarm = |hour, minute, second| Alarm { hour, minute, second };
        assert_eq!(alarm(None, None, None).first_after(10), Some(11));
        assert_eq!(alarm(Some(1), Some(2), Some(3)).first_after(0), Some(3723));
        assert_eq!(alarm(Some(1), Some(2), Some(3)).first_after(3723), Some(3723 + 86_400));
        assert_eq!(alarm(None, None, Some(30)).first_after(30), Some(90));
        assert_eq!(alarm(Some(23), None, None).first_after(0), Some(23 * 3600));
        for bad in [alarm(Some(24), None, None), alarm(None, Some(60), None), alarm(None, None, Some(99))] {
            assert_eq!(bad.first_after(1_763_865_682), None);
        }
    }
}
