use super::*;
use crate::virtio::testing::memory;

fn ticket() -> Ticket {
    Ticket {
        queue: 0,
        head: 0,
        status: GuestAddress(0),
        written: 0,
        work: Work::begin(&Request::Flush),
    }
}

fn ring() -> (Ring, Arc<File>) {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(1 << 20).unwrap();
    let mut ring = Ring::new(Arc::clone(&file)).unwrap();
    ring.start(memory());
    (ring, file)
}

/// Submits one entry by hand and returns its result.
fn result_of(ring: &mut Ring, entry: &squeue::Entry) -> i32 {
    // SAFETY: none of these tests' entries has a pointer that the kernel follows.
    unsafe { ring.ring.submission().push(entry) }.unwrap();
    ring.ring.submit_and_wait(1).unwrap();
    ring.ring.completion().next().unwrap().result()
}

#[test]
fn a_ring_does_nothing_but_what_it_is_for() {
    let (mut ring, file) = ring();
    let number = io_uring::types::Fd(file.as_raw_fd());
    let refused = -libc::EACCES;
    // Operations that would lead out.
    let entries = [
        opcode::Nop::new().build(),
        opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
        opcode::Close::new(number).build(),
        opcode::Ftruncate::new(number, 0).build(),
        opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
        opcode::FilesUpdate::new([0].as_ptr(), 1).build(),
        opcode::Write::new(number, std::ptr::null(), 0).build(),
        opcode::Fsync::new(DISK)
            .build()
            .flags(Flags::ASYNC | Flags::FIXED_FILE),
        // A file by its number.
        opcode::Fsync::new(number).build(),
    ];
    for entry in entries {
        assert_eq!(result_of(&mut ring, &entry), refused, "{entry:?}");
    }
    assert_eq!(result_of(&mut ring, &opcode::Fsync::new(DISK).build()), 0);
    // There is one file, and what a ring is registered with is settled.
    let second = opcode::Fsync::new(Fixed(1)).build();
    assert_eq!(result_of(&mut ring, &second), -libc::EBADF);
    let submitter = ring.ring.submitter();
    for settled in [
        submitter.register_files(&[0]),
        submitter.register_eventfd(0),
        submitter.register_personality().map(drop),
        submitter.unregister_files(),
        submitter.register_iowq_max_workers(&mut [0, 0]),
    ] {
        assert_eq!(settled.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}

#[test]
fn what_the_kernel_could_not_do_just_now_is_done_all_the_same() {
    let (mut ring, file) = ring();
    std::os::unix::fs::FileExt::write_all_at(&*file, &[7; 8192], 0).unwrap();
    let segments = [Segment {
        address: GuestAddress(0x1000),
        len: 8192,
    }];
    for errno in [libc::EAGAIN, libc::EINTR, libc::ECANCELED] {
        let slot = &mut ring.slots[0];
        slot.state = State::Read {
            offset: 0,
            left: 8192,
        };
        let memory = ring.memory.as_ref().unwrap();
        let filled = slot
            .pieces
            .fill(memory, &segments, 0, 8192, Permissions::Write);
        assert_eq!(filled.unwrap().len(), 8192);
        // A first half by the kernel, the rest here.
        assert!(slot.advance(4096, &file).is_none());
        assert!(slot.advance(-errno, &file).unwrap().is_ok());
        let mut there = [0; 8192];
        vm_memory::Bytes::read_slice(memory, &mut there[4096..], GuestAddress(0x2000)).unwrap();
        assert_eq!(there[4096..], [7; 4096]);
        slot.state = State::Sync;
        assert!(slot.advance(-errno, &file).unwrap().is_ok());
    }
    let slot = &mut ring.slots[0];
    slot.state = State::Sync;
    let error = slot.advance(-libc::EIO, &file).unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    slot.state = State::Read { offset: 0, left: 1 };
    let error = slot.advance(0, &file).unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    slot.state = State::Free;
}

#[test]
fn takes_no_more_than_it_has_room_for_and_nothing_outside_memory() {
    let (mut ring, _) = ring();
    let outside = [Segment {
        address: GuestAddress(1 << 40),
        len: 512,
    }];
    let job = Job::Read {
        segments: &outside,
        offset: 0,
        len: 512,
    };
    assert!(matches!(
        ring.push(job, ticket()),
        Err(PushError::Memory(_))
    ));
    assert_eq!(ring.in_flight(), 0);
    for _ in 0..SLOTS {
        ring.push(Job::Sync, ticket()).unwrap();
    }
    assert!(!ring.has_room());
    assert!(matches!(
        ring.push(Job::Sync, ticket()),
        Err(PushError::Full)
    ));
    let mut ended = 0;
    ring.drain(|_, result| {
        result.unwrap();
        ended += 1;
    });
    assert_eq!((ended, ring.in_flight()), (SLOTS, 0));
    // Without memory there is nothing to work on.
    assert!(matches!(
        ring.push(Job::Sync, ticket()),
        Err(PushError::Full)
    ));
}
