//! Tap interfaces as the command line names them.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;

/// Longest name of a network interface (`IFNAMSIZ` without the final zero).
const MAX_INTERFACE: usize = 15;
/// Most queues of one.
const MAX_QUEUES: u8 = 8;

/// A tap interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tap {
    /// What the machine config calls it: the interface itself, or that of the machine that was saved.
    pub name: String,
    /// The interface.
    pub interface: String,
    /// How many of its queues the machine uses.
    pub queues: u8,
}

/// The interfaces of `TAP[:QUEUES]`; of those in another namespace only the words are checked.
pub fn taps(words: &[String], elsewhere: bool) -> Result<Vec<Tap>, Error> {
    let taps: Vec<Tap> = words
        .iter()
        .map(|word| tap(word))
        .collect::<Result<_, _>>()?;
    let mut seen = BTreeSet::new();
    for Tap { name, .. } in &taps {
        if !seen.insert(name) {
            return Err(Error::TwoTaps(name.clone()));
        }
        // In another namespace the jailer finds out.
        if !elsewhere
            && !Path::new("/sys/class/net")
                .join(name)
                .join("tun_flags")
                .exists()
        {
            return Err(Error::NoTap(name.clone()));
        }
    }
    Ok(taps)
}

fn tap(word: &str) -> Result<Tap, Error> {
    let bad = || Error::BadTap(word.to_owned());
    let (name, queues) = match word.split_once(':') {
        Some((name, queues)) => (name, queues.parse().map_err(|_| bad())?),
        None => (word, 1),
    };
    let well_formed = !name.is_empty()
        && name.len() <= MAX_INTERFACE
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b'=');
    if !well_formed || !(1..=MAX_QUEUES).contains(&queues) {
        return Err(bad());
    }
    Ok(Tap {
        name: name.to_owned(),
        interface: name.to_owned(),
        queues,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let check = |names: &[&str], elsewhere| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            taps(&names, elsewhere)
        };
        let found = check(&["a", "b:8"], true).unwrap();
        assert_eq!((found[0].queues, found[1].queues), (1, 8));
        assert_eq!(found[1].name, "b");
        assert!(matches!(check(&["a", "a:2"], true), Err(Error::TwoTaps(_))));
        for bad in [
            "",
            "../x",
            "a=b",
            "..",
            "sixteen-letters-",
            "a:0",
            "a:9",
            "a:",
            "a:1:1",
        ] {
            assert!(
                matches!(check(&[bad], true), Err(Error::BadTap(_))),
                "{bad}"
            );
        }
        assert!(matches!(
            check(&["no-such-tap"], false),
            Err(Error::NoTap(_))
        ));
    }
}
