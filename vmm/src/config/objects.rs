//! Reads JSON in which an object is an object.
//!
//! Serde takes an array of the right length for a structure: `[1, null, 2]` would be a rate limiter's bucket. Nobody
//! means that, and what the API calls an object must be one. Everything that is read passes through here, where a
//! structure is asked for as a map; all else is handed on as it is.

use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

/// Reads a value from JSON.
///
/// # Errors
/// When it is not JSON, or not such a value.
pub fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = T::deserialize(Objects(&mut json))?;
    json.end()?;
    Ok(value)
}

/// Stands between a value and what it is read from, at every depth.
struct Objects<T>(T);

/// `name(arguments)` for each, with the visitor in between.
macro_rules! hand_on {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        fn $name<V: Visitor<'de>>(self, $($argument: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            self.0.$name($($argument,)* Objects(visitor))
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Objects<D> {
    type Error = D::Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(Objects(visitor))
    }

    hand_on! {
        deserialize_any();
        deserialize_bool();
        deserialize_i8();
        deserialize_i16();
        deserialize_i32();
        deserialize_i64();
        deserialize_u8();
        deserialize_u16();
        deserialize_u32();
        deserialize_u64();
        deserialize_f32();
        deserialize_f64();
        deserialize_char();
        deserialize_str();
        deserialize_string();
        deserialize_bytes();
        deserialize_byte_buf();
        deserialize_option();
        deserialize_unit();
        deserialize_unit_struct(name: &'static str);
        deserialize_newtype_struct(name: &'static str);
        deserialize_seq();
        deserialize_tuple(len: usize);
        deserialize_tuple_struct(name: &'static str, len: usize);
        deserialize_map();
        deserialize_enum(name: &'static str, variants: &'static [&'static str]);
        deserialize_identifier();
        deserialize_ignored_any();
    }
}

/// The same for what a visitor is shown; `($value: $type)` are plain values.
macro_rules! show {
    ($($name:ident($type:ty);)*) => {$(
        fn $name<E: serde::de::Error>(self, value: $type) -> Result<V::Value, E> {
            self.0.$name(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Objects<V> {
    type Value = V::Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(out)
    }

    show! {
        visit_bool(bool);
        visit_i64(i64);
        visit_u64(u64);
        visit_f64(f64);
        visit_str(&str);
        visit_borrowed_str(&'de str);
        visit_string(String);
        visit_bytes(&[u8]);
        visit_borrowed_bytes(&'de [u8]);
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_none()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(Objects(inner))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.0.visit_newtype_struct(Objects(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Objects(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Objects(fields))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.0.visit_enum(Objects(variant))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Objects<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Objects(from))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Objects<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Objects(seed))
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Objects<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_key_seed(Objects(seed))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(Objects(seed))
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Objects<A> {
    type Error = A::Error;
    type Variant = Objects<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let (value, variant) = self.0.variant_seed(Objects(seed))?;
        Ok((value, Objects(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Objects<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.0.newtype_variant_seed(Objects(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(len, Objects(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, Objects(visitor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, CpuTemplate, Drive, Entropy, Logger, RateLimiter};

    #[track_caller]
    fn refused<T: DeserializeOwned + fmt::Debug>(text: &str) -> String {
        assert!(serde_json::from_str::<T>(text).is_ok(), "{text}");
        from_slice::<T>(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn an_array_is_no_object_at_any_depth() {
        let why = refused::<RateLimiter>("[null, null]");
        assert!(why.contains("invalid type: sequence"), "{why}");
        refused::<Logger>(" [null, null, null, null, null]");
        refused::<Entropy>(r#"{"rate_limiter": [null, null]}"#);
        refused::<Entropy>(r#"{"rate_limiter": {"ops": [1, null, 2]}}"#);
        refused::<CpuTemplate>(r#"{"msr_modifiers": [["0x10", "0b1"]]}"#);
        refused::<Config>(r#"{"boot-source": ["/k", null, null, null]}"#);
    }

    #[test]
    fn all_else_is_read_as_it_is() {
        let text = r#"{"drive_id": "a", "path_on_host": "\u002fd", "is_read_only": true, "queues": 2,
            "cache_type": "Writeback", "rate_limiter": {"ops": {"size": 18446744073709551615, "refill_time": 1}}}"#;
        let plain: Drive = serde_json::from_str(text).unwrap();
        assert_eq!(from_slice::<Drive>(text.as_bytes()).unwrap(), plain);
        let any = r#"[1, -2, 3.5, "x", null, true, {"a": [{}]}]"#;
        let plain: serde_json::Value = serde_json::from_str(any).unwrap();
        assert_eq!(
            from_slice::<serde_json::Value>(any.as_bytes()).unwrap(),
            plain
        );
        for wrong in [r#"{"drive_id": "a"} x"#, r#"{"drive_id": 1}"#, "{", ""] {
            let plain = serde_json::from_str::<Drive>(wrong)
                .unwrap_err()
                .to_string();
            let why = from_slice::<Drive>(wrong.as_bytes())
                .unwrap_err()
                .to_string();
            assert_eq!(why, plain, "{wrong}");
        }
    }
}
