use std::io::Write as _;

use proptest::prelude::*;

use super::*;
use crate::testing;

/// Something with branches and repetitions, so that every decoder and filter has work.
fn kernel() -> Vec<u8> {
    let mut content = Vec::new();
    for i in 0..20_000_u32 {
        content.extend([0xe8]);
        content.extend((i.wrapping_mul(2_654_435_761) >> 12).to_le_bytes());
        content.extend(b"push rbp");
    }
    let size = content.len() as u64;
    testing::elf(&content, size)
}

fn with_size(mut compressed: Vec<u8>, unpacked: &[u8]) -> Vec<u8> {
    compressed.extend((unpacked.len() as u32).to_le_bytes());
    compressed
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(1);
    options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    encoder.write_all(bytes).unwrap();
    with_size(encoder.finish().unwrap(), bytes)
}

/// One legacy frame of one block (lz4_Frame_format.md, "Legacy frame").
fn lz4(bytes: &[u8]) -> Vec<u8> {
    let block = lz4_flex::block::compress(bytes);
    let mut payload = 0x184c_2102_u32.to_le_bytes().to_vec();
    payload.extend((block.len() as u32).to_le_bytes());
    payload.extend(block);
    with_size(payload, bytes)
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    with_size(ruzstd::encoding::compress_to_vec(bytes, level), bytes)
}

fn all() -> [(Compression, Vec<u8>); 4] {
    let kernel = kernel();
    [
        (Compression::Gzip, gzip(&kernel)),
        (Compression::Xz, xz(&kernel)),
        (Compression::Lz4Legacy, lz4(&kernel)),
        (Compression::Zstd, zstd(&kernel)),
    ]
}

#[test]
fn unpacks_every_compression() {
    let kernel = kernel();
    for (compression, payload) in all() {
        let file = testing::bzimage(&payload);
        let mut output = Vec::new();
        let (image, written) = unpack(file.as_slice(), 1 << 20, &mut output).unwrap();
        assert_eq!(image.compression(file.as_slice()).unwrap(), compression);
        assert_eq!(written, kernel.len() as u64);
        assert!(output == kernel, "{compression:?}");
        assert_eq!(image.release(), Some("6.1.0-test"));
        assert_eq!(image.kernel_version.as_deref(), Some("6.1.0-test (me)"));
    }
}

#[test]
fn every_truncation_is_refused() {
    let small = testing::elf(&[0x90; 200], 200);
    for payload in [gzip(&small), xz(&small), lz4(&small), zstd(&small)] {
        let file = testing::bzimage(&payload);
        for length in 0..file.len() {
            assert!(
                unpack(&file[..length], 1 << 20, &mut Vec::new()).is_err(),
                "{length} of {} bytes",
                file.len()
            );
        }
    }
}

/// The payload cut short inside a file that is long enough: the decoders' own truncation.
#[test]
fn cut_payloads_are_refused() {
    for (compression, payload) in all() {
        for cut in [7, 20, payload.len() / 2, payload.len() - 5] {
            let mut cut = payload[..cut].to_vec();
            cut.extend(&payload[payload.len() - 4..]);
            let file = testing::bzimage(&cut);
            assert!(
                unpack(file.as_slice(), 1 << 20, &mut Vec::new()).is_err(),
                "{compression:?}"
            );
        }
    }
}

#[test]
fn hostile_sizes_are_refused() {
    let (_, payload) = all().into_iter().nth(1).unwrap();
    let refused = |payload: &[u8], limit| {
        let mut output = Vec::new();
        let error = unpack(testing::bzimage(payload).as_slice(), limit, &mut output).unwrap_err();
        (error, output.len())
    };
    let size = kernel().len() as u64;
    let (error, written) = refused(&payload, size - 1);
    assert!(matches!(error, Error::DeclaredTooLarge { .. }), "{error}");
    assert_eq!(written, 0);
    // Claims less than comes out: a bomb stops at the claim.
    let mut bomb = payload.clone();
    let end = bomb.len();
    bomb[end - 4..].copy_from_slice(&1000_u32.to_le_bytes());
    let (error, written) = refused(&bomb, size);
    assert!(
        matches!(error, Error::WrongSize { actual: 1001, .. }),
        "{error}"
    );
    assert!(written <= 1000);
    // Claims more than comes out.
    bomb[end - 4..].copy_from_slice(&(size as u32 + 1).to_le_bytes());
    let (error, _) = refused(&bomb, size + 1);
    assert!(matches!(error, Error::WrongSize { .. }), "{error}");
}

#[test]
fn a_payload_that_is_no_kernel_is_never_written() {
    let mut output = Vec::new();
    let file = testing::bzimage(&gzip(&[0x42; 4096]));
    let error = unpack(file.as_slice(), 1 << 20, &mut output).unwrap_err();
    assert!(matches!(error, Error::BadElf(_)), "{error}");
    assert!(output.is_empty());
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let refused = |patches: &[(usize, &[u8])]| {
        let mut file = testing::bzimage(&gzip(&kernel()));
        for (offset, bytes) in patches {
            file[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        unpack(file.as_slice(), 1 << 20, &mut Vec::new())
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&[(0x202, b"SrdH")]).starts_with("not a kernel"));
    assert!(refused(&[(0x206, &[7, 2])]).contains("boot protocol 2.07"));
    // The header's fields are 32 bits wide: 4 GiB is the largest claim, and it must not wrap.
    assert!(refused(&[(0x24c, &[0xff; 4])]).contains("claims a payload of 4294967295 bytes"));
    assert!(refused(&[(0x248, &[0xff; 8])]).contains("claims a payload"));
    assert!(refused(&[(0x24c, &[0; 4])]).contains("payload of 0 bytes"));
    assert!(refused(&[(0x1f1, &[0xff])]).contains("claims a payload"));
    assert!(refused(&[(0x410, b"BZh91A")]).contains("bzip2"));
    assert!(refused(&[(0x410, &[4, 0x22, 0x4d, 0x18])]).contains("modern"));
    assert!(refused(&[(0x410, &[0x5d, 0, 0])]).contains("lzma"));
    assert!(refused(&[(0x410, b"\x89LZO")]).contains("lzo"));
    assert!(refused(&[(0x410, b"hello!")]).contains("no known compression"));
}

#[test]
fn version_strings_are_text_or_nothing() {
    let version = |pointer: u16, text: &[u8]| {
        let mut file = testing::bzimage(&gzip(&kernel()));
        file[0x20e..0x210].copy_from_slice(&pointer.to_le_bytes());
        file[0x380..0x380 + text.len()].copy_from_slice(text);
        BzImage::parse(file.as_slice()).unwrap().kernel_version
    };
    assert_eq!(version(0x180, b"6.9\0").as_deref(), Some("6.9"));
    assert_eq!(version(0x180, b"\x1b[2J\0"), None);
    assert_eq!(version(0, b"6.9\0"), None);
    assert_eq!(version(0xffff, b"6.9\0"), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_corruption_panics_or_runs_on(
        which in 0_usize..4,
        patches in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let small = testing::elf(&kernel()[..3000], 3000);
        let payload = [gzip, xz, lz4, zstd][which](&small);
        let mut file = testing::bzimage(&payload);
        let body = file.len() - 0x410;
        for (index, value) in patches {
            file[0x410 + index.index(body)] = value;
        }
        let mut output = Vec::new();
        let _ = unpack(file.as_slice(), 8192, &mut output);
        prop_assert!(output.len() <= 8192);
    }

    #[test]
    fn no_header_panics(patches in prop::collection::vec((0x1f1_usize..0x270, any::<u8>()), 1..40)) {
        let mut file = testing::bzimage(&gzip(&testing::elf(&[0x90; 200], 200)));
        for (offset, value) in patches {
            file[offset] = value;
        }
        let _ = unpack(file.as_slice(), 8192, &mut Vec::new());
    }
}
