//! `cpu-config`: what a guest sees of its CPU, as masks over what KVM offers.

use std::fmt::Write as _;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A template, or in a config file also the path of a file that holds one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum CpuConfig {
    /// The file.
    Path(String),
    /// The template itself.
    Template(CpuTemplate),
}

/// A CPU template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTemplate {
    /// Capabilities that KVM must have (`"69"`), or need not have (`"!69"`).
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes to CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes to model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability of KVM that is checked, or is not although it would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// Must be there.
    Add(u32),
    /// Need not be there.
    Remove(u32),
}

/// Changes to one subleaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// EAX, a number in a string.
    #[serde(with = "number")]
    pub leaf: u32,
    /// ECX, a number in a string.
    #[serde(with = "number")]
    pub subleaf: u32,
    /// `kvm_cpuid_entry2.flags`
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// Changes to one register of a subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// Its bits.
    pub bitmap: Bitmap<32>,
}

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "registers have no other names")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes to one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number, in a string.
    #[serde(with = "number")]
    pub addr: u32,
    /// Its bits.
    pub bitmap: Bitmap<64>,
}

/// Bits that are set (`1`), cleared (`0`) or left as they are (`x`), written as `0b01xx`; underscores part
/// them, and those to the left that are not written are left as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    /// Which bits change.
    pub filter: u64,
    /// What they become.
    pub value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// A register's value after the change.
    pub fn apply(&self, register: u64) -> u64 {
        (register & !self.filter) | self.value
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let mut bitmap = Self::default();
        let mut bit = 0;
        for digit in digits.bytes().rev().filter(|digit| *digit != b'_') {
            if bit >= BITS {
                return None;
            }
            let mask = 1_u64.checked_shl(bit)?;
            match digit {
                b'x' => {}
                b'0' => bitmap.filter |= mask,
                b'1' => {
                    bitmap.filter |= mask;
                    bitmap.value |= mask;
                }
                _ => return None,
            }
            bit = bit.saturating_add(1);
        }
        Some(bitmap)
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::custom(format!(
                "{text:.80?} is no bitmap: use 0b and at most {BITS} of the characters 0, 1 and x"
            ))
        })
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |bit: u32| {
            let mask = 1_u64.checked_shl(bit).unwrap_or(0);
            match (self.filter & mask != 0, self.value & mask != 0) {
                (false, _) => 'x',
                (true, false) => '0',
                (true, true) => '1',
            }
        };
        let mut text = String::from("0b");
        text.extend((0..BITS).rev().map(digit));
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = match text.strip_prefix('!') {
            Some(digits) => digits.parse().map(Self::Remove),
            None => text.parse().map(Self::Add),
        };
        parsed.map_err(|_| D::Error::custom(format!("{text:.80?} is no number of a capability")))
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Add(number) => serializer.collect_str(number),
            Self::Remove(number) => serializer.collect_str(&format_args!("!{number}")),
        }
    }
}

/// A number in a string: decimal, `0x…` or `0b…`.
mod number {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => u32::from_str_radix(digits, 16),
            (None, Some(digits)) => u32::from_str_radix(digits, 2),
            (None, None) => text.parse(),
        };
        parsed.map_err(|_| D::Error::custom(format!("{text:.80?} is no number below 2³²")))
    }

    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "the signature that serde calls"
    )]
    pub(super) fn serialize<S: Serializer>(value: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = write!(text, "{value:#x}");
        serializer.serialize_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_what_was_written() {
        let text = r#"{"kvm_capabilities":["!69","5"],
            "cpuid_modifiers":[{"leaf":"0x80000001","subleaf":"0b0111","flags":0,
                "modifiers":[{"register":"eax","bitmap":"0b00_1x"}]}],
            "msr_modifiers":[{"addr":"16","bitmap":"1"}]}"#;
        let template: CpuTemplate = serde_json::from_str(text).unwrap();
        let cpuid = &template.cpuid_modifiers[0];
        assert_eq!((cpuid.leaf, cpuid.subleaf), (0x8000_0001, 7));
        let bitmap = cpuid.modifiers[0].bitmap;
        assert_eq!((bitmap.filter, bitmap.value), (0b1110, 0b0010));
        assert_eq!(bitmap.apply(0xffff_ffff), 0xffff_fff3);
        assert_eq!(template.msr_modifiers[0].addr, 16);
        assert_eq!(
            template.kvm_capabilities,
            [KvmCapability::Remove(69), KvmCapability::Add(5)]
        );
        let again = serde_json::to_string(&template).unwrap();
        let again: CpuTemplate = serde_json::from_str(&again).unwrap();
        assert_eq!(again, template);
    }

    #[test]
    fn refuses_what_is_no_template() {
        let wide = format!("\"{}\"", "x".repeat(33));
        for wrong in ["\"2\"", "\"0b0b\"", wide.as_str(), "1"] {
            assert!(
                serde_json::from_str::<Bitmap<32>>(wrong).is_err(),
                "{wrong}"
            );
        }
        assert!(serde_json::from_str::<Bitmap<64>>(&wide).is_ok());
        for wrong in [
            r#"{"kvm_capabilities":["x"]}"#,
            r#"{"msr_modifiers":[{"addr":"0x100000000","bitmap":"1"}]}"#,
            r#"{"msr_modifier":[]}"#,
        ] {
            assert!(
                serde_json::from_str::<CpuTemplate>(wrong).is_err(),
                "{wrong}"
            );
        }
    }
}
