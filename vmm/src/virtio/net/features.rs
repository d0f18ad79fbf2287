//! What a network card and its driver agree on (virtio 1.2, section 5.1.3).

use super::tap::Offloads;

pub const F_CSUM: u64 = 1 << 0;
pub const F_GUEST_CSUM: u64 = 1 << 1;
pub const F_MTU: u64 = 1 << 3;
pub const F_MAC: u64 = 1 << 5;
pub const F_GUEST_TSO4: u64 = 1 << 7;
pub const F_GUEST_TSO6: u64 = 1 << 8;
pub const F_GUEST_ECN: u64 = 1 << 9;
pub const F_GUEST_UFO: u64 = 1 << 10;
pub const F_HOST_TSO4: u64 = 1 << 11;
pub const F_HOST_TSO6: u64 = 1 << 12;
pub const F_HOST_ECN: u64 = 1 << 13;
pub const F_HOST_UFO: u64 = 1 << 14;
pub const F_MRG_RXBUF: u64 = 1 << 15;
pub const F_CTRL_VQ: u64 = 1 << 17;
pub const F_MQ: u64 = 1 << 22;
pub const F_GUEST_USO4: u64 = 1 << 54;
pub const F_GUEST_USO6: u64 = 1 << 55;
pub const F_HOST_USO: u64 = 1 << 56;

/// What every host's taps can do.
pub const ALWAYS: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF;

/// What taps of some kernels can do: the offloads that tell, and the features that they are. Large
/// UDP packets as fragments went with Linux 4.14 and came back in 4.16, as segments they came with 6.2.
pub const SOMETIMES: [(Offloads, u64); 2] = [
    (Offloads::UFO, F_GUEST_UFO | F_HOST_UFO),
    (
        Offloads::USO4.and(Offloads::USO6),
        F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO,
    ),
];

/// What a card may do to packets, whoever is behind it.
pub const OFFLOADS: u64 =
    ALWAYS | F_GUEST_UFO | F_HOST_UFO | F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO;

/// What the tap may hand over unfinished, given what the driver accepted.
pub fn offloads(features: u64) -> Offloads {
    // Section 5.1.3.1: the others need checksums, and ECN needs TSO.
    if features & F_GUEST_CSUM == 0 {
        return Offloads::default();
    }
    let ecn = if features & (F_GUEST_TSO4 | F_GUEST_TSO6) == 0 {
        0
    } else {
        F_GUEST_ECN
    };
    // The kernel takes both kinds of UDP segments or none.
    let uso = F_GUEST_USO4 | F_GUEST_USO6;
    let uso = if features & uso == uso { uso } else { 0 };
    [
        (F_GUEST_TSO4, Offloads::TSO4),
        (F_GUEST_TSO6, Offloads::TSO6),
        (F_GUEST_UFO, Offloads::UFO),
        (ecn, Offloads::ECN),
        (uso, Offloads::USO4.and(Offloads::USO6)),
    ]
    .into_iter()
    .filter(|(bits, _)| features & bits != 0)
    .fold(Offloads::CSUM, |all, (_, offload)| all.and(offload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_follow_what_they_need() {
        assert_eq!(offloads(F_GUEST_TSO4 | F_GUEST_USO4), Offloads::default());
        let with = |features| offloads(F_GUEST_CSUM | features);
        let csum = Offloads::CSUM;
        assert_eq!(with(F_GUEST_ECN | F_GUEST_USO4), csum);
        assert_eq!(with(F_GUEST_TSO6), csum.and(Offloads::TSO6));
        let tso = csum.and(Offloads::TSO4).and(Offloads::ECN);
        assert_eq!(with(F_GUEST_TSO4 | F_GUEST_ECN), tso);
        let uso = csum.and(Offloads::USO4).and(Offloads::USO6);
        assert_eq!(with(F_GUEST_USO4 | F_GUEST_USO6), uso);
    }
}
