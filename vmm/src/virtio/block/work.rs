//! What a request moves, for the metrics.

use std::time::Instant;

use super::request::Request;
use crate::metrics::fields::BlockMetrics;

/// A request that is being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    kind: Kind,
    start: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read(u64),
    Write(u64),
    Flush,
    Other,
}

impl Work {
    /// `request` begins now.
    pub fn begin(request: &Request) -> Self {
        let kind = match request {
            Request::Read { len, .. } => Kind::Read(*len),
            Request::Write { len, .. } => Kind::Write(*len),
            Request::Flush => Kind::Flush,
            Request::Id | Request::Deallocate { .. } => Kind::Other,
        };
        let start = Instant::now();
        Self { kind, start }
    }

    /// It has been done.
    pub fn end(self, metrics: &BlockMetrics) {
        match self.kind {
            Kind::Read(bytes) => {
                metrics.read_count.inc();
                metrics.read_bytes.add(bytes);
                metrics.read_agg.record(self.start);
            }
            Kind::Write(bytes) => {
                metrics.write_count.inc();
                metrics.write_bytes.add(bytes);
                metrics.write_agg.record(self.start);
            }
            Kind::Flush => metrics.flush_count.inc(),
            Kind::Other => {}
        }
    }
}
