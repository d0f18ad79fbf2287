//! The process's own heap.
#![allow(unsafe_code)] // mallopt has no safe form.

/// Makes all threads share one heap.
///
/// Otherwise glibc's allocator maps one for each thread. Before the ninth it counts the host's CPUs, and before
/// it shrinks one it asks whether the kernel overcommits memory: both open a file, which a sealed thread may not.
/// It also saves memory, and our threads allocate too rarely to wait for each other.
///
/// To be called before any thread is started.
pub fn share_among_threads() {
    // SAFETY: mallopt takes two numbers and may be called at any time. That it refuses a
    // parameter it documents is not to be expected, and would only cost what it saves.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
