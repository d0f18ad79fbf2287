//! What the compiler expects of a C library, and the stack.

use core::arch::global_asm;
use core::panic::PanicInfo;

use crate::{machine, serial};

global_asm!(
    r#"
    .section .text
    .globl memcpy
    .globl memmove
    .globl memset
    .globl memcmp
    .globl bcmp
memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jb 1f
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
1:  mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    test rcx, rcx
    repe cmpsb
    je 2f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
2:  ret

    # The stack. No larger than needed: ring 0 maps it page by page, and where KVM interprets ring 0
    # each page delays the start by microseconds.
    .section .bss
    .align 4096
    .skip 262144
    .globl stack_top
stack_top:
    .skip 8
"#
);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::line(format_args!("probe: panic FAIL: {info}"));
    machine::end("reset")
}
