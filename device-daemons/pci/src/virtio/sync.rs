//! Which bytes of the configuration space the guest has written later than the back end has said what is there.

/// A field that the guest may write: from this byte to that.
pub type Span = (usize, usize);

/// State of the exchange with the back end.
#[derive(Debug, Default)]
pub struct Sync {
    /// The back end has a configuration space.
    remote: bool,
    /// Written and not told.
    dirty: Vec<Span>,
    /// Told, and not confirmed by a read after it.
    told: Vec<Span>,
    /// Reads that are not answered.
    reads: u32,
}

impl Sync {
    /// The guest has written this field. A device has few.
    pub fn add(&mut self, span: Span) {
        if !self.dirty.contains(&span) {
            self.dirty.push(span);
        }
    }

    /// Forgets what has not been told; says whether there was anything.
    pub fn forget(&mut self) -> bool {
        !std::mem::take(&mut self.dirty).is_empty()
    }

    /// What to tell the back end now, and to read all after it: one change at a time.
    pub fn begin(&mut self) -> Vec<Span> {
        if !self.remote || !self.told.is_empty() {
            return Vec::new();
        }
        self.told = std::mem::take(&mut self.dirty);
        if !self.told.is_empty() {
            self.reads += 1;
        }
        self.told.clone()
    }

    /// Whether to read because of a change at the back end: two reads that are under way are enough, the second one has
    /// not begun.
    pub const fn ask(&mut self) -> bool {
        let asks = self.remote && self.reads < 2;
        if asks {
            self.reads += 1;
        }
        asks
    }

    /// A read is answered.
    pub fn answered(&mut self) {
        self.reads = self.reads.saturating_sub(1);
        if self.reads == 0 {
            self.told.clear();
        }
    }

    /// A back end is there, with or without a configuration space.
    pub const fn connected(&mut self, remote: bool) {
        self.remote = remote;
    }

    /// The back end is away and may not have got what it was told.
    pub fn lost(&mut self) {
        *self = Self { dirty: self.unknown(), ..Self::default() };
    }

    /// What the back end may not know.
    pub fn unknown(&self) -> Vec<Span> {
        let mut all = self.dirty.clone();
        all.extend(self.told.iter().filter(|span| !self.dirty.contains(span)));
        all
    }

    /// Whether the guest's byte is newer than what the back end says of it.
    pub fn is_newer(&self, at: usize) -> bool {
        self.dirty.iter().chain(&self.told).any(|(from, to)| (*from..*to).contains(&at))
    }
}
