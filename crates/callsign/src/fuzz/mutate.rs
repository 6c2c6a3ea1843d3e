//! Inputs from samples, by changes that parsers have stumbled over

use fastrand::Rng;

/// Inputs do not grow without end, but beyond what is allowed for a value.
const LONGEST: usize = 70_000;

/// What means something to one reader or another
const TOKENS: [&str; 56] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "\\",
    "/",
    "//",
    "://",
    "@",
    "?",
    "&",
    "=",
    "#",
    "%",
    "%2F",
    "%40",
    "%00",
    "%zz",
    "%ff",
    "[::1]",
    "[",
    "0.0.0.0",
    ":0",
    ":65536",
    ":80",
    "+1",
    "-0",
    "1e400",
    "1e-400",
    "18446744073709551616",
    "null",
    "true",
    "\"\"",
    "\"Op\":1,",
    "\"Addr\":",
    "\"aDDr\":\"h:1\",",
    "\"Metadata\":{",
    "\"weight\":",
    "\"zone\":\"",
    "\\u0000",
    "\\ud800",
    "\\u001b",
    "etcd:///",
    "direct:///",
    "http://",
    "https://",
    "?key=",
    "&namespace=",
    "&tls_ca=",
    "root:secret@",
    "\r\n",
    "\u{1b}[2J",
    "\0",
];

/// Controls, invisible and turning characters, long ones
const CHARACTERS: [char; 10] =
    ['\0', '\n', '\u{7f}', '\u{85}', '\u{200b}', '\u{202e}', '\u{2028}', '\u{feff}', 'é', '😀'];

/// Begins nowhere as UTF-8
const NO_UTF8: [u8; 5] = [0xc3, 0xff, 0xed, 0xa0, 0x80];

/// Makes one input after the other
pub(super) struct Mutator<'a> {
    rng: Rng,
    samples: Vec<&'a [u8]>,
    tried: Vec<u8>,
}

impl<'a> Mutator<'a> {
    pub(super) fn new<S: AsRef<[u8]>>(rng: Rng, samples: &'a [S]) -> Self {
        Self { rng, samples: samples.iter().map(AsRef::as_ref).collect(), tried: Vec::new() }
    }

    /// The samples as they are, then any of them changed a few times
    pub(super) fn input(&mut self, number: u64) -> &[u8] {
        let asis = usize::try_from(number).ok().and_then(|number| self.samples.get(number).copied());
        self.tried.clear();
        let sample = asis.unwrap_or_else(|| self.sample());
        self.tried.extend_from_slice(sample);
        if asis.is_none() {
            // Most samples are wrong after one change already: what is still right is of interest, too.
            let changes = if self.rng.bool() { 1 } else { self.rng.u32(2..6) };
            for _ in 0..changes {
                self.change();
            }
        }
        self.tried.truncate(LONGEST);
        &self.tried
    }

    fn change(&mut self) {
        match self.rng.u32(0..100) {
            0..15 => self.flip(),
            15..30 => self.cut(),
            30..60 => {
                let token = TOKENS[self.rng.usize(..TOKENS.len())];
                self.insert(token.as_bytes());
            }
            60..70 => {
                let character = CHARACTERS[self.rng.usize(..CHARACTERS.len())];
                self.insert(character.encode_utf8(&mut [0; 4]).as_bytes());
            }
            70..75 => {
                let start = self.rng.usize(..NO_UTF8.len());
                self.insert(&NO_UTF8[start..]);
            }
            75..85 => self.splice(),
            85..90 => self.repeat(),
            90..95 => self.nest(),
            _ => {
                let end = self.position();
                self.tried.truncate(end);
            }
        }
    }

    fn sample(&mut self) -> &'a [u8] {
        self.samples[self.rng.usize(..self.samples.len())]
    }

    /// Anywhere, the end included
    fn position(&mut self) -> usize {
        self.rng.usize(..=self.tried.len())
    }

    fn range(&mut self) -> std::ops::Range<usize> {
        let start = self.position();
        let most = (self.tried.len() - start).min(16);
        start..start + self.rng.usize(..=most)
    }

    fn insert(&mut self, bytes: &[u8]) {
        let position = self.position();
        self.tried.splice(position..position, bytes.iter().copied());
    }

    /// Of one byte a bit, its case, or all
    fn flip(&mut self) {
        if self.tried.is_empty() {
            return;
        }
        let position = self.rng.usize(..self.tried.len());
        let flipped = match self.rng.u32(0..3) {
            0 => 1 << self.rng.u32(0..8),
            1 => 0x20,
            _ => self.rng.u8(..),
        };
        self.tried[position] ^= flipped;
    }

    fn cut(&mut self) {
        let range = self.range();
        self.tried.drain(range);
    }

    /// Goes on with another sample
    fn splice(&mut self) {
        let end = self.position();
        self.tried.truncate(end);
        let other = self.sample();
        self.tried.extend_from_slice(&other[self.rng.usize(..=other.len())..]);
    }

    fn repeat(&mut self) {
        let range = self.range();
        let often = match self.rng.u32(0..500) {
            0 => 10_000,
            _ => self.rng.usize(1..40),
        };
        let bytes = self.tried[range].repeat(often);
        self.insert(&bytes);
    }

    fn nest(&mut self) {
        let deep = match self.rng.u32(0..500) {
            0 => 20_000,
            _ => self.rng.usize(1..200),
        };
        let (open, close) = [("[", "]"), ("{\"x\":", "}")][self.rng.usize(..2)];
        let nested = format!("{}1{}", open.repeat(deep), close.repeat(deep));
        self.insert(nested.as_bytes());
    }
}
