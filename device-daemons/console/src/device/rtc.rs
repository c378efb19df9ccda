//! MC146818 real-time clock with the century register and 114 bytes of NVRAM.
//!
//! The time of day is the host's clock in UTC plus an offset; setting the time changes the offset.
//! Updates, alarms and periodic ticks are not stepped: they are worked out from the time that has
//! passed when somebody looks or when a timer that [`Rtc::next_event`] asked for is over.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::calendar::{self, DateTime, SECOND};

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where the FADT says that the century is.
pub const CENTURY: u8 = 0x32;
const REGISTERS: usize = 128;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Both bits set hold the divider chain in reset.
const A_DIVIDER_RESET: u8 = 0x60;
/// 32.768 kHz crystal, 1024 Hz periodic rate.
const A_DEFAULT: u8 = 0x26;

const B_SET: u8 = 1 << 7;
const B_PERIODIC: u8 = 1 << 6;
const B_ALARM: u8 = 1 << 5;
const B_UPDATE: u8 = 1 << 4;
const B_SQUARE_WAVE: u8 = 1 << 3;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;

/// Register C has the flags where register B has the enable bits.
const C_FLAGS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;
const C_INTERRUPT: u8 = 1 << 7;

const D_VALID: u8 = 1 << 7;

const HOUR_PM: u8 = 1 << 7;
/// An alarm register from here on matches every value.
const ALARM_ANY: u8 = 0xc0;
/// Before an update, UIP is set for this long (data sheet: 244 us), in nanoseconds.
const UPDATE_WARNING: i128 = 244_140;
/// The first update comes half a second after the divider chain was let go, in nanoseconds.
const DIVIDER_START: i128 = SECOND / 2;
const CRYSTAL_HZ: i128 = 32_768;

/// The clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    index: u8,
    /// All registers; those of the time count only while the clock is held.
    #[serde(serialize_with = "save_registers", deserialize_with = "load_registers")]
    registers: [u8; REGISTERS],
    /// Guest's time less host's time, in nanoseconds.
    offset: i128,
    /// Guest's time up to which flags have been worked out.
    seen: i128,
    line: bool,
    #[serde(skip)]
    edge: bool,
}

fn save_registers<S: Serializer>(registers: &[u8; REGISTERS], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_bytes(registers)
}

fn load_registers<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; REGISTERS], D::Error> {
    let bytes = <&[u8]>::deserialize(from)?;
    bytes.try_into().map_err(|_| D::Error::custom("another number of registers"))
}

/// Guest's times are within this many nanoseconds of 1970: a binary century register counts up to 255.
const FAR: i128 = 30_000 * 366 * 86_400 * SECOND;

impl Rtc {
    /// A clock that shows the host's time `wall` (nanoseconds since 1970, UTC).
    #[must_use]
    pub fn new(wall: i128) -> Self {
        let mut rtc =
            Self { index: 0, registers: [0; REGISTERS], offset: 0, seen: wall, line: false, edge: false };
        rtc.store(REG_A, A_DEFAULT);
        rtc.store(REG_B, B_24_HOURS);
        rtc
    }

    /// Whether a guest can have brought this about.
    #[must_use]
    pub const fn is_possible(&self) -> bool {
        -FAR < self.offset && self.offset < FAR && -FAR < self.seen && self.seen < FAR
    }

    /// What the reset line does: interrupts off; time, mode and NVRAM stay.
    pub fn reset(&mut self, wall: i128) {
        self.update(wall);
        self.index = 0;
        self.store(REG_B, self.load(REG_B) & !(C_FLAGS | B_SQUARE_WAVE));
        self.store(REG_C, 0);
        self.update_line();
        self.edge = false;
    }

    /// Reads the index port (`offset` 0) or the data port.
    pub fn read(&mut self, offset: u64, wall: i128) -> u8 {
        if offset == 0 {
            return 0xff;
        }
        self.update(wall);
        match self.index {
            index @ (SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY) => {
                if self.held() {
                    self.load(index)
                } else {
                    self.time_register(index, wall)
                }
            }
            REG_A => {
                let soon = self.guest(wall).rem_euclid(SECOND) >= SECOND - UPDATE_WARNING;
                let busy = if soon && !self.held() { A_UPDATE_IN_PROGRESS } else { 0 };
                self.load(REG_A) | busy
            }
            REG_C => {
                let value = self.load(REG_C);
                self.store(REG_C, 0);
                self.update_line();
                value
            }
            REG_D => D_VALID,
            index => self.load(index),
        }
    }

    /// Writes the index port (`offset` 0) or the data port.
    pub fn write(&mut self, offset: u64, value: u8, wall: i128) {
        if offset == 0 {
            // Bit 7 masks the NMI on real machines.
            self.index = value & 0x7f;
            return;
        }
        self.update(wall);
        match self.index {
            index @ (SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY) => {
                if self.held() {
                    self.store(index, value);
                } else {
                    self.hold(wall);
                    self.store(index, value);
                    self.release(wall, self.guest(wall).rem_euclid(SECOND));
                }
            }
            REG_A => self.control(REG_A, value & !A_UPDATE_IN_PROGRESS, wall),
            REG_B if value & B_SET != 0 => self.control(REG_B, value & !B_UPDATE, wall),
            REG_B => self.control(REG_B, value, wall),
            REG_C | REG_D => {}
            index => self.store(index, value),
        }
    }

    /// Works out what has happened up to `wall`.
    pub fn update(&mut self, wall: i128) {
        let guest = self.guest(wall);
        let mut flags = 0;
        if self.periods(guest) > self.periods(self.seen) {
            flags |= B_PERIODIC;
        }
        if !self.held() && guest > self.seen {
            if guest.div_euclid(SECOND) > self.seen.div_euclid(SECOND) {
                flags |= B_UPDATE;
            }
            if self.next_alarm().is_some_and(|at| at <= guest) {
                flags |= B_ALARM;
            }
        }
        self.seen = guest;
        self.store(REG_C, self.load(REG_C) | flags);
        self.update_line();
    }

    /// Nanoseconds of host time until an interrupt, if one is due. None while one is unacknowledged.
    #[must_use]
    pub fn next_event(&self, wall: i128) -> Option<u64> {
        let enabled = self.load(REG_B);
        if self.line || enabled & C_FLAGS == 0 {
            return None;
        }
        let mut next: Option<i128> = None;
        let mut consider = |at: i128| next = Some(next.map_or(at, |n| n.min(at)));
        if let (true, Some(period)) = (enabled & B_PERIODIC != 0, self.period()) {
            consider(((self.periods(self.seen) + 1) * period * SECOND).div_euclid(CRYSTAL_HZ) + 1);
        }
        if !self.held() {
            if enabled & B_UPDATE != 0 {
                consider((self.seen.div_euclid(SECOND) + 1) * SECOND);
            }
            if let (true, Some(at)) = (enabled & B_ALARM != 0, self.next_alarm()) {
                consider(at);
            }
        }
        next.map(|at| u64::try_from((at - self.guest(wall)).max(0)).unwrap_or(u64::MAX))
    }

    /// Whether the interrupt line has risen since the last call.
    pub fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.edge)
    }

    fn load(&self, index: u8) -> u8 {
        self.registers.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn store(&mut self, index: u8, value: u8) {
        if let Some(register) = self.registers.get_mut(usize::from(index)) {
            *register = value;
        }
    }

    const fn guest(&self, wall: i128) -> i128 {
        wall.saturating_add(self.offset)
    }

    fn divider_stopped(&self) -> bool {
        self.load(REG_A) & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    /// Whether the time registers stand still for the guest to set them.
    fn held(&self) -> bool {
        self.load(REG_B) & B_SET != 0 || self.divider_stopped()
    }

    /// Periodic rate in cycles of the crystal.
    fn period(&self) -> Option<i128> {
        match self.load(REG_A) & 0x0f {
            _ if self.divider_stopped() => None,
            0 => None,
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Periods that are over at a guest's time.
    fn periods(&self, guest: i128) -> i128 {
        let cycles = guest.saturating_mul(CRYSTAL_HZ).div_euclid(SECOND);
        self.period().map_or(0, |period| cycles.div_euclid(period))
    }

    /// Changes register A or B, and holds or releases the time with it.
    fn control(&mut self, index: u8, value: u8, wall: i128) {
        let (was_held, was_stopped) = (self.held(), self.divider_stopped());
        if !was_held {
            self.hold(wall);
        }
        self.store(index, value);
        if !self.held() && was_held {
            let fraction = if was_stopped { DIVIDER_START } else { self.guest(wall).rem_euclid(SECOND) };
            self.release(wall, fraction);
        }
        // A new rate has its own periods.
        self.seen = self.guest(wall);
        self.update_line();
    }

    /// Copies the time into its registers, where it stands still.
    fn hold(&mut self, wall: i128) {
        for index in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
            self.store(index, self.time_register(index, wall));
        }
    }

    /// Lets the time go on from its registers and a fraction of a second in nanoseconds.
    fn release(&mut self, wall: i128, fraction: i128) {
        let time = DateTime {
            year: i64::from(self.decode(self.load(CENTURY))) * 100 + i64::from(self.decode(self.load(YEAR))),
            month: self.decode(self.load(MONTH)),
            day: self.decode(self.load(DAY)),
            hour: self.decode_hour(self.load(HOURS)),
            minute: self.decode(self.load(MINUTES)),
            second: self.decode(self.load(SECONDS)),
        };
        let guest = i128::from(time.seconds()) * SECOND + fraction;
        self.offset = guest.saturating_sub(wall);
        self.seen = guest;
    }

    fn time_register(&self, index: u8, wall: i128) -> u8 {
        let seconds = self.guest(wall).div_euclid(SECOND);
        let time = DateTime::at(seconds);
        match index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            WEEKDAY => self.encode(calendar::weekday(seconds)),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode(calendar::two_digits(time.year)),
            _ => self.encode(calendar::two_digits(time.year.div_euclid(100))),
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.load(REG_B) & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    /// The value of a register; digits beyond 9 count for what they are.
    fn decode(&self, raw: u8) -> u8 {
        if self.load(REG_B) & B_BINARY != 0 { raw } else { (raw >> 4) * 10 + (raw & 0x0f) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.load(REG_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let clock = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(clock) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        if self.load(REG_B) & B_24_HOURS != 0 {
            return self.decode(raw);
        }
        self.decode(raw & !HOUR_PM) % 12 + if raw & HOUR_PM != 0 { 12 } else { 0 }
    }

    /// Guest's time of the first alarm after `seen`, if the alarm registers name a time of day.
    fn next_alarm(&self) -> Option<i128> {
        let field = |index: u8, hour: bool| match self.load(index) {
            ALARM_ANY.. => None,
            raw if hour => Some(i128::from(self.decode_hour(raw))),
            raw => Some(i128::from(self.decode(raw))),
        };
        let alarm = calendar::Alarm {
            hour: field(HOURS_ALARM, true),
            minute: field(MINUTES_ALARM, false),
            second: field(SECONDS_ALARM, false),
        };
        alarm.first_after(self.seen.div_euclid(SECOND)).map(|at| at * SECOND)
    }

    fn update_line(&mut self) {
        let flags = self.load(REG_C) & C_FLAGS;
        let line = flags & self.load(REG_B) != 0;
        self.store(REG_C, flags | if line { C_INTERRUPT } else { 0 });
        self.edge |= line && !self.line;
        self.line = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2025-11-23 02:41:22.5 UTC, a Sunday.
    const MORNING: i128 = 1_763_865_682 * SECOND + SECOND / 2;

    fn get(rtc: &mut Rtc, index: u8, wall: i128) -> u8 {
        rtc.write(0, index, wall);
        rtc.read(1, wall)
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8, wall: i128) {
        rtc.write(0, index, wall);
        rtc.write(1, value, wall);
    }

    fn time(rtc: &mut Rtc, wall: i128) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| get(rtc, index, wall))
    }

    #[test]
    fn the_time_is_the_hosts_in_every_mode() {
        let mut rtc = Rtc::new(MORNING);
        assert_eq!(time(&mut rtc, MORNING), [0x20, 0x25, 0x11, 0x23, 0x01, 0x02, 0x41, 0x22]);
        set(&mut rtc, REG_B, B_24_HOURS | B_BINARY, MORNING);
        assert_eq!(time(&mut rtc, MORNING), [20, 25, 11, 23, 1, 2, 41, 22]);
        set(&mut rtc, REG_B, 0, MORNING);
        for (hour, shown) in [(-2, 0x12), (-1, 0x01), (0, 0x02), (10, 0x92), (11, 0x81), (21, 0x91)] {
            assert_eq!(get(&mut rtc, HOURS, MORNING + hour * 3600 * SECOND), shown);
        }
        assert_eq!(get(&mut rtc, REG_D, MORNING), D_VALID);
    }

    /// Linux's order: SET, divider reset, the registers, SET off, divider on.
    #[test]
    fn setting_the_time_moves_the_offset() {
        let mut rtc = Rtc::new(MORNING);
        set(&mut rtc, REG_B, B_24_HOURS | B_SET, MORNING);
        set(&mut rtc, REG_A, A_DEFAULT | 0x70, MORNING);
        let later = MORNING + 3 * SECOND;
        assert_eq!(get(&mut rtc, SECONDS, later), 0x22, "held");
        for (index, value) in
            [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23), (MINUTES, 0x59)]
        {
            set(&mut rtc, index, value, later);
        }
        set(&mut rtc, SECONDS, 0x59, later);
        set(&mut rtc, REG_B, B_24_HOURS, later);
        assert_eq!(get(&mut rtc, SECONDS, later + 2 * SECOND), 0x59, "the divider is still in reset");
        set(&mut rtc, REG_A, A_DEFAULT, later);
        let almost = later + SECOND / 2 - 1;
        assert_eq!(time(&mut rtc, almost), [0x19, 0x99, 0x12, 0x31, 0x06, 0x23, 0x59, 0x59]);
        assert_eq!(time(&mut rtc, almost + 1), [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]);
        rtc.reset(almost);
        assert_eq!(get(&mut rtc, YEAR, almost), 0x99, "a reset keeps the time");
    }

    #[test]
    fn every_time_that_a_guest_can_set_is_possible() {
        for (mode, value) in [(B_BINARY, 0xff), (0, 0xff), (B_BINARY, 0), (0, 0)] {
            let mut rtc = Rtc::new(MORNING);
            set(&mut rtc, REG_B, B_24_HOURS | B_SET | mode, MORNING);
            for index in [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS] {
                set(&mut rtc, index, value, MORNING);
            }
            set(&mut rtc, REG_B, B_24_HOURS | mode, MORNING);
            assert!(rtc.is_possible(), "{mode:#x} {value:#x}");
        }
    }

    #[test]
    fn a_register_written_in_flight_changes_that_field() {
        let mut rtc = Rtc::new(MORNING);
        set(&mut rtc, MINUTES, 0x05, MORNING);
        assert_eq!(time(&mut rtc, MORNING)[5..], [0x02, 0x05, 0x22]);
    }

    #[test]
    fn update_in_progress_is_seen_just_before_the_second() {
        let mut rtc = Rtc::new(MORNING);
        let next = MORNING + SECOND / 2;
        for (wall, busy) in [(MORNING, false), (next - 245_000, false), (next - 244_000, true), (next, false)]
        {
            assert_eq!(get(&mut rtc, REG_A, wall) & A_UPDATE_IN_PROGRESS != 0, busy);
        }
    }

    #[test]
    fn the_alarm_rings_once_and_is_acknowledged_by_register_c() {
        let mut rtc = Rtc::new(MORNING);
        assert_eq!(rtc.next_event(MORNING), None);
        for (index, value) in [(HOURS_ALARM, 0x02), (MINUTES_ALARM, 0x42), (SECONDS_ALARM, 0x00)] {
            set(&mut rtc, index, value, MORNING);
        }
        set(&mut rtc, REG_B, B_24_HOURS | B_ALARM, MORNING);
        let wait = rtc.next_event(MORNING).unwrap();
        assert_eq!(i128::from(wait), 38 * SECOND - SECOND / 2);
        let at = MORNING + i128::from(wait);
        rtc.update(at - 1);
        assert!(!rtc.take_edge());
        rtc.update(at);
        assert!(rtc.take_edge());
        assert_eq!(rtc.next_event(at), None, "not again before it is acknowledged");
        assert_eq!(get(&mut rtc, REG_C, at), C_INTERRUPT | C_FLAGS);
        assert_eq!(get(&mut rtc, REG_C, at), 0);
        assert_eq!(i128::from(rtc.next_event(at).unwrap()), 86_400 * SECOND);
    }

    #[test]
    fn alarms_with_wildcards_ring_each_hour_minute_or_second() {
        let mut rtc = Rtc::new(MORNING);
        set(&mut rtc, REG_B, B_24_HOURS | B_ALARM, MORNING);
        for (fields, wait) in [([0xff, 0xff, 0xff], 1), ([0xff, 0xff, 0x30], 8), ([0xff, 0x00, 0x00], 1118)] {
            for (index, value) in [HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM].into_iter().zip(fields) {
                set(&mut rtc, index, value, MORNING);
            }
            assert_eq!(i128::from(rtc.next_event(MORNING).unwrap()), wait * SECOND - SECOND / 2);
        }
    }

    #[test]
    fn periodic_interrupts_come_at_their_rate() {
        for (rate, per_second) in [(1u8, 256), (3, 8192), (6, 1024), (15, 2)] {
            let mut rtc = Rtc::new(MORNING);
            set(&mut rtc, REG_A, 0x20 | rate, MORNING);
            set(&mut rtc, REG_B, B_24_HOURS | B_PERIODIC, MORNING);
            let (mut wall, mut count) = (MORNING, 0);
            loop {
                wall += i128::from(rtc.next_event(wall).unwrap());
                if wall > MORNING + SECOND {
                    break;
                }
                rtc.update(wall);
                assert!(rtc.take_edge(), "rate {rate}");
                assert_eq!(get(&mut rtc, REG_C, wall) & B_PERIODIC, B_PERIODIC);
                count += 1;
            }
            assert!((per_second - 1..=per_second + 1).contains(&count), "rate {rate}: {count}");
        }
    }

    #[test]
    fn the_update_interrupt_comes_each_second_and_not_while_set() {
        let mut rtc = Rtc::new(MORNING);
        set(&mut rtc, REG_B, B_24_HOURS | B_UPDATE, MORNING);
        assert_eq!(i128::from(rtc.next_event(MORNING).unwrap()), SECOND / 2);
        set(&mut rtc, REG_B, B_24_HOURS | B_UPDATE | B_SET, MORNING);
        assert_eq!(get(&mut rtc, REG_B, MORNING), B_24_HOURS | B_SET, "SET clears the update interrupt");
        assert_eq!(rtc.next_event(MORNING), None);
    }

    #[test]
    fn a_host_clock_that_jumps_raises_at_most_one_interrupt() {
        let mut rtc = Rtc::new(MORNING);
        set(&mut rtc, REG_B, B_24_HOURS | B_UPDATE | B_PERIODIC, MORNING);
        rtc.update(MORNING - 1000 * SECOND);
        assert!(!rtc.take_edge());
        rtc.update(MORNING + 1_000_000 * SECOND);
        assert!(rtc.take_edge());
        rtc.update(MORNING + 2_000_000 * SECOND);
        assert!(!rtc.take_edge());
    }

    #[test]
    fn nvram_is_kept_and_the_index_port_is_write_only() {
        let mut rtc = Rtc::new(0);
        for index in (0x0e..0x80).filter(|index| *index != CENTURY) {
            set(&mut rtc, index | 0x80, index ^ 0x55, 0);
        }
        rtc.reset(0);
        for index in (0x0e..0x80).filter(|index| *index != CENTURY) {
            assert_eq!(get(&mut rtc, index, 0), index ^ 0x55);
        }
        assert_eq!(rtc.read(0, 0), 0xff);
    }
}
