# From either boot protocol to ring 3 in as few instructions as possible: where KVM
# emulates ring 0, each of them costs half a microsecond, while ring 3 runs natively.
# For that reason the tables below are laid out by the assembler, not filled in at run time.

.set IMAGE, 0x100000

.section .start, "awx"
.code64
.globl start64
start64:                                # Linux 64-bit protocol: rsi = boot_params
    mov ecx, [rsi + 0x228]              # cmd_line_ptr
    xor edi, edi
    jmp enter

# PVH: 32-bit protected mode, flat segments, paging off, ebx = hvm_start_info.
.code32
.globl start32
start32:
    mov eax, cr4
    or eax, 0x620                       # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, cr0
    or eax, 0x80000002                  # PG, MP
    and eax, 0xfffffffb                 # not EM
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                          # far jump to 64-bit code
    .long enter_from_pvh
    .word 0x08

.code64
enter_from_pvh:
    mov esi, ebx
    mov ecx, [rsi + 24]                 # cmdline_paddr
    mov edi, 1
    jmp to_ring3

enter:
    mov rax, cr4
    or eax, 0x620
    mov cr4, rax
    mov rax, cr0
    or eax, 2
    and eax, 0xfffffffb
    mov cr0, rax
    mov eax, offset pml4
    mov cr3, rax
    lgdt [gdt_pointer]

to_ring3:                               # rdi: 0 = boot_params, 1 = start_info; rsi: its address
    # HLT is what ring 3 may not do, and not every host can come back from there: a guest that is
    # to sleep says so by its command line's first word.
    jrcxz 1f
    cmp dword ptr [rcx], 0x656c6469     # "idle"
    je idle
1:
    lidt [idt_pointer]
    mov eax, 0x28
    ltr ax
    mov esp, offset ring0_stack_top     # neither protocol promises a stack
    push 0x1b                           # ss: user data
    push offset stack_top - 8           # as after a call: the ABI wants rsp at 16n + 8
    push 2                              # rflags: ports are opened by the TSS, not by IOPL
    push 0x23                           # cs: user code
    push offset probe_main
    iretq

idle:
    mov esi, offset idle_line
    mov ecx, 12                         # its length
    mov dx, 0x3f8
2:  lodsb
    out dx, al
    dec ecx
    jnz 2b
    cli
3:  hlt
    jmp 3b
idle_line:
    .ascii "probe: idle\n"

.globl crash
crash:                                  # no gate for it in the empty IDT: a triple fault
    ud2

.align 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 kernel code, 64-bit
    .quad 0x00cf93000000ffff            # 0x10 kernel data
    .quad 0x00cff3000000ffff            # 0x18 user data   (selector 0x1b)
    .quad 0x00affb000000ffff            # 0x20 user code, 64-bit (selector 0x23)
    .quad 0x0000891000000000 + (tss_end - tss - 1) + ((tss - start64) << 16)   # 0x28 TSS at IMAGE + offset
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad IMAGE + (gdt - start64)

.align 16
tss:
    .long 0
    .quad IMAGE + (ring0_stack_top - start64)    # rsp0
    .fill 90, 1, 0
    .word 0x68                          # I/O permission bitmap: ports 0 to 0x3ff are open
    .fill 0x400 / 8, 1, 0
    .byte 0xff
tss_end:

idt_pointer:
    .word 0
    .quad 0

.align 16
    .fill 64, 8, 0
ring0_stack_top:

# Identity map of 5 GiB (memory of devices begins at the fourth) in 2 MiB pages, open to ring 3. Accessed and dirty are set
# beforehand, so that the walk never has to write them.
.align 4096
pml4:
    .quad IMAGE + (pdpt - start64) + 0x27
    .fill 511, 8, 0
.globl pdpt
pdpt:
    .quad IMAGE + (pd - start64) + 0x27
    .quad IMAGE + (pd - start64) + 0x1027
    .quad IMAGE + (pd - start64) + 0x2027
    .quad IMAGE + (pd - start64) + 0x3027
    .quad IMAGE + (pd - start64) + 0x4027
    .fill 507, 8, 0
pd:
    .set address, 0
    .rept 2560
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr

.section .note.pvh, "a"
    .long 4, 4, 18                      # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32
