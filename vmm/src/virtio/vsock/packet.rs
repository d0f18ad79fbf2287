//! The header of every vsock packet (virtio 1.2, section 5.10.6).

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 44;
/// The host's CID.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only type here.
pub const STREAM: u16 = 1;

/// Operations.
pub mod op {
    /// Connect.
    pub const REQUEST: u16 = 1;
    /// Connected.
    pub const RESPONSE: u16 = 2;
    /// Refused, or the end of a connection.
    pub const RST: u16 = 3;
    /// One side will not send, or not receive, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// How much room there is.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks how much room there is.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of a SHUTDOWN: its sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// Flag of a SHUTDOWN: its sender sends no more.
pub const NO_SEND: u32 = 2;
/// Both.
pub const CLOSED: u32 = NO_RECEIVE | NO_SEND;

/// struct virtio_vsock_hdr, copied from or to guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sends.
    pub src_cid: u64,
    /// To whom.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of a SHUTDOWN.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that went out of it, ever.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header in `bytes`.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let (head, tail) = bytes.split_at(16);
        let long = |i| u64::from_le_bytes(take(head, i));
        let word = |i| u32::from_le_bytes(take(tail, i));
        let half = |i| u16::from_le_bytes(take(tail, i));
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(0),
            dst_port: word(4),
            len: word(8),
            kind: half(12),
            op: half(14),
            flags: word(16),
            buf_alloc: word(20),
            fwd_cnt: word(24),
        }
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

/// `N` bytes of `bytes` at `at`.
fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut taken = [0; N];
    for (to, from) in taken.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lies_in_memory_as_the_spec_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 0x4142,
            op: 0x5152,
            flags: 0x6162_6364,
            buf_alloc: 0x7172_7374,
            fwd_cnt: 0x8182_8384,
        };
        let bytes = header.encode();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(
            bytes[24..32],
            [0x34, 0x33, 0x32, 0x31, 0x42, 0x41, 0x52, 0x51]
        );
        assert_eq!(bytes[40..], [0x84, 0x83, 0x82, 0x81]);
        assert_eq!(Header::decode(&bytes), header);
    }
}
