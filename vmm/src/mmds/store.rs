//! The metadata: one JSON document, replaced or patched by the host, read by the guest.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};
use thiserror::Error;

/// Why metadata was not changed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// It would have more bytes than allowed.
    #[error(
        "the metadata would have {size} bytes: at most {limit} are allowed (--mmds-size-limit)"
    )]
    TooLarge {
        /// Bytes it would have as JSON.
        size: usize,
        /// Bytes it may have.
        limit: usize,
    },
    /// There is nothing to patch.
    #[error("there is no metadata to change: put some first")]
    Empty,
}

/// The document, shared by the control thread, which writes it, and device threads, which read it.
#[derive(Debug)]
pub struct Store {
    limit: usize,
    /// The lock is held to copy or exchange the pointer, never while anything is formatted.
    document: Mutex<Option<Arc<Value>>>,
}

impl Store {
    /// An empty store of at most `limit` bytes as JSON.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            document: Mutex::new(None),
        }
    }

    /// The document, if there ever was one.
    pub fn document(&self) -> Option<Arc<Value>> {
        let document = self.document.lock();
        document.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the document.
    ///
    /// # Errors
    /// When it is too large; the old one stays.
    pub fn put(&self, document: Value) -> Result<(), Error> {
        let size = size(&document);
        if size > self.limit {
            let limit = self.limit;
            return Err(Error::TooLarge { size, limit });
        }
        let mut current = self.document.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Some(Arc::new(document));
        Ok(())
    }

    /// Changes the document as a JSON merge patch says (RFC 7396). One thread at a time may.
    ///
    /// # Errors
    /// When there is none, or it became too large; the old one stays.
    pub fn patch(&self, patch: &Value) -> Result<(), Error> {
        let mut document = self.document().ok_or(Error::Empty)?.as_ref().clone();
        merge(&mut document, patch);
        self.put(document)
    }
}

/// Bytes of a document as JSON.
fn size(document: &Value) -> usize {
    document.to_string().len()
}

/// RFC 7396, section 2. As deep as `patch`, whose depth the JSON reader bounds.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(members) = target {
        for (key, change) in changes {
            if change.is_null() {
                members.remove(key);
            } else {
                merge(members.entry(key.clone()).or_insert(Value::Null), change);
            }
        }
    }
}

/// How a value is shown to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As JSON.
    Json,
    /// As a cloud's instance metadata: a string's text, or an object's keys, those of objects with
    /// a slash.
    Text,
}

/// Why a value is not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotShown {
    /// There is no such value.
    NotFound,
    /// It is neither a string nor an object, and those alone have a text.
    NoText,
}

/// The value at `path`: a JSON pointer (RFC 6901), but for slashes that are doubled or at its end.
pub fn show(document: Option<&Value>, path: &str, format: Format) -> Result<String, NotShown> {
    let parts = path.split('/').filter(|part| !part.is_empty());
    let pointer: String = parts.flat_map(|part| ["/", part]).collect();
    let document = document.unwrap_or(&Value::Null);
    let value = document.pointer(&pointer).ok_or(NotShown::NotFound)?;
    match (format, value) {
        (Format::Json, _) => Ok(value.to_string()),
        (Format::Text, Value::String(text)) => Ok(text.clone()),
        (Format::Text, Value::Object(members)) => Ok(listing(members)),
        (Format::Text, _) => Err(NotShown::NoText),
    }
}

fn listing(members: &Map<String, Value>) -> String {
    let lines: Vec<String> = members
        .iter()
        .map(|(key, value)| match value {
            Value::Object(_) => format!("{key}/"),
            _ => key.clone(),
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merges_as_the_rfc_says() {
        // Appendix A of RFC 7396.
        for (target, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (
                json!({"a":"b","b":"c"}),
                json!({"a":null}),
                json!({"b":"c"}),
            ),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (
                json!({"a":{"b":"c"}}),
                json!({"a":{"b":"d","c":null}}),
                json!({"a":{"b":"d"}}),
            ),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (
                json!({}),
                json!({"a":{"bb":{"ccc":null}}}),
                json!({"a":{"bb":{}}}),
            ),
        ] {
            let mut merged = target.clone();
            merge(&mut merged, &patch);
            assert_eq!(merged, result, "{target} with {patch}");
        }
    }

    #[test]
    fn keeps_to_its_limit() {
        let store = Store::new(20);
        assert_eq!(store.patch(&json!({"a":1})), Err(Error::Empty));
        store.put(json!({"a":"0123456789"})).unwrap();
        let too_large = |size| Err(Error::TooLarge { size, limit: 20 });
        assert_eq!(store.put(json!({"a":"012345678901234"})), too_large(23));
        assert_eq!(store.patch(&json!({"b":1234})), too_large(27));
        assert_eq!(
            store.document().unwrap().to_string(),
            r#"{"a":"0123456789"}"#
        );
        store.patch(&json!({"a":null,"b":1234})).unwrap();
        assert_eq!(store.document().unwrap().to_string(), r#"{"b":1234}"#);
    }

    #[test]
    fn shows_values_in_both_formats() {
        let document = json!({
            "latest": {"meta-data": {"id": "i-1", "n": 7, "list": ["x", {"y": "z"}], "a/b": "~"}},
            "user-data": "1\n2",
        });
        let text = |path| show(Some(&document), path, Format::Text);
        let as_json = |path| show(Some(&document), path, Format::Json);
        for path in ["/", "//"] {
            assert_eq!(text(path).unwrap(), "latest/\nuser-data");
        }
        for path in ["/latest/meta-data", "//latest///meta-data/"] {
            assert_eq!(text(path).unwrap(), "a/b\nid\nlist\nn");
        }
        assert_eq!(text("/user-data").unwrap(), "1\n2");
        assert_eq!(text("/latest/meta-data/a~1b").unwrap(), "~");
        assert_eq!(text("/latest/meta-data/list/1/y").unwrap(), "z");
        assert_eq!(text("/latest/meta-data/n"), Err(NotShown::NoText));
        assert_eq!(text("/latest/meta-data/list"), Err(NotShown::NoText));
        assert_eq!(as_json("/latest/meta-data/n").unwrap(), "7");
        assert_eq!(as_json("/user-data").unwrap(), r#""1\n2""#);
        for path in [
            "/x",
            "/latest/meta-data/list/2",
            "/user-data/x",
            "/latest/meta-data/list/01",
        ] {
            assert_eq!(as_json(path), Err(NotShown::NotFound), "{path}");
        }
        assert_eq!(show(None, "/", Format::Json).unwrap(), "null");
        assert_eq!(show(None, "/x", Format::Json), Err(NotShown::NotFound));
    }
}
