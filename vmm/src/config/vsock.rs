//! `vsock`: the socket device.

use serde::{Deserialize, Serialize};

use super::{Error, check_path, range};

/// Context ids 0 to 2 and the largest number have fixed meanings (vsock(7)).
const CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// A name that nothing uses any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context id, 3 to 2³² - 2.
    pub guest_cid: u64,
    /// The Unix socket that host programs connect to; `<uds_path>_<port>` is where the guest connects to.
    pub uds_path: String,
}

impl Vsock {
    pub(super) fn check(&self) -> Result<(), Error> {
        check_path("vsock.uds_path", &self.uds_path)?;
        if !CIDS.contains(&self.guest_cid) {
            return range(
                "vsock.guest_cid",
                self.guest_cid,
                "use 3 to 4294967294; the others have fixed meanings",
            );
        }
        Ok(())
    }
}
