//! Session tokens: until when they are good, under a key that only this process has.
//!
//! A token carries its end and a message authentication code, so none has to be remembered and a
//! guest that asks for millions fills nothing. The key is drawn anew in every process: a clone of
//! this machine refuses this one's tokens.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Bytes of a token before its code: its end in milliseconds, and its number.
const CLAIM: usize = 16;
/// Bytes of the code.
const CODE: usize = 32;
/// Characters of a token.
pub const TOKEN_LEN: usize = (CLAIM + CODE) * 2;

/// How long a token may be good, in seconds: up to six hours.
pub const LIFETIMES: std::ops::RangeInclusive<u32> = 1..=21600;

/// Makes tokens and knows them again.
pub struct Tokens {
    keyed: Hmac<Sha256>,
    start: Instant,
    made: AtomicU64,
}

impl Tokens {
    /// With a key from the kernel's random source.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn new() -> io::Result<Self> {
        let mut key = [0; 64];
        random(&mut key)?;
        Ok(Self {
            keyed: Hmac::new(&key.into()),
            start: Instant::now(),
            made: AtomicU64::new(0),
        })
    }

    /// A token that is good for `seconds` from `now` on.
    pub fn make(&self, seconds: u32, now: Instant) -> String {
        let end = self
            .age(now)
            .saturating_add(Duration::from_secs(seconds.into()));
        let end = u64::try_from(end.as_millis()).unwrap_or(u64::MAX);
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let claim = [end.to_be_bytes(), number.to_be_bytes()].concat();
        let code = self.code(&claim).finalize().into_bytes();
        claim
            .iter()
            .chain(&code)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Whether `token` was made here and is good at `now`.
    pub fn is_good(&self, token: &str, now: Instant) -> bool {
        let Some(bytes) = from_hex(token) else {
            return false;
        };
        let (claim, code) = bytes.split_at(CLAIM);
        // Compared in constant time.
        if self.code(claim).verify_slice(code).is_err() {
            return false;
        }
        let end = claim
            .first_chunk()
            .map_or(0, |end| u64::from_be_bytes(*end));
        self.age(now) < Duration::from_millis(end)
    }

    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }

    fn code(&self, claim: &[u8]) -> Hmac<Sha256> {
        let mut code = self.keyed.clone();
        code.update(claim);
        code
    }
}

/// Fills `bytes` from the kernel's random source.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let count = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())?;
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(())
}

fn from_hex(text: &str) -> Option<[u8; CLAIM + CODE]> {
    let digits: &[u8; TOKEN_LEN] = text.as_bytes().try_into().ok()?;
    let digit = |c: u8| (c as char).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut bytes = [0; CLAIM + CODE];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let &[high, low] = pair else { return None };
        *byte = digit(high)? << 4 | digit(low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_its_end_and_only_here() {
        let tokens = Tokens::new().unwrap();
        let now = Instant::now();
        let token = tokens.make(60, now);
        assert_eq!(token.len(), TOKEN_LEN);
        let after = |seconds| now + Duration::from_secs(seconds);
        assert!(tokens.is_good(&token, now));
        assert!(tokens.is_good(&token, after(59)));
        assert!(!tokens.is_good(&token, after(61)));
        assert_ne!(tokens.make(60, now), token);
        assert!(!Tokens::new().unwrap().is_good(&token, now));
    }

    #[test]
    fn no_character_of_a_token_can_be_changed() {
        let tokens = Tokens::new().unwrap();
        let now = Instant::now();
        let token = tokens.make(1, now);
        for at in 0..TOKEN_LEN {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'f' { b'0' } else { b'f' };
            let changed = String::from_utf8(changed).unwrap();
            assert!(!tokens.is_good(&changed, now), "{changed}");
        }
        for other in [
            "",
            "x",
            &token[1..],
            &format!("{token}0"),
            &"é".repeat(TOKEN_LEN / 2),
        ] {
            assert!(!tokens.is_good(other, now), "{other}");
        }
    }
}
