//! From the PVH entry point (32-bit, paging off) and from an AP's real mode to Rust in 64-bit ring 3.
//!
//! A KVM without hardware virtualization emulates ring 0 at about 1.5 million instructions a second, and
//! only simple ones: so ring 0 loads tables that the image already contains and leaves by `iretq`.
//! Every page is a user page; a TSS I/O bitmap of zeros opens all ports.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// How many CPUs the tables have room for.
pub const MAX_CPUS: usize = 256;
/// Where the real-mode code of the APs is copied to; its page number is the SIPI vector.
pub const TRAMPOLINE: usize = 0x8000;

const RING3_STACK: usize = 16 << 10;
const RING0_STACK: usize = 4 << 10;
/// Present, writable, user.
const TABLE: u64 = 7;
/// The same, accessed, dirty, 2 MiB.
const LARGE: u64 = 0xe7;
const TSS_SIZE: usize = 104;
const TSS_SELECTOR: usize = 0x40;
/// One bit for each of 65,536 ports and the byte of ones that must follow.
const BITMAP: usize = 8192 + 1;

/// A page of page-table entries.
#[repr(C, align(4096))]
pub struct PageTable(pub [AtomicU64; 512]);

const fn first_four_gib() -> [PageTable; 4] {
    let mut tables = [const { PageTable([const { AtomicU64::new(0) }; 512]) }; 4];
    let mut page = 0;
    while page < 2048 {
        tables[page / 512].0[page % 512] = AtomicU64::new(((page as u64) << 21) | LARGE);
        page += 1;
    }
    tables
}

#[unsafe(no_mangle)]
#[unsafe(link_section = ".tables")]
static PAGE_DIRECTORIES: [PageTable; 4] = first_four_gib();

/// Task state of every CPU, all of them sharing the one bitmap behind the last.
#[repr(C, align(4096))]
struct TaskStates {
    states: [[AtomicU8; TSS_SIZE]; MAX_CPUS],
    bitmap: [AtomicU8; BITMAP],
}

#[unsafe(no_mangle)]
static TASK_STATES: TaskStates = TaskStates {
    states: [const { [const { AtomicU8::new(0) }; TSS_SIZE] }; MAX_CPUS],
    bitmap: [const { AtomicU8::new(0) }; BITMAP],
};

/// Index for the next CPU that starts; the boot CPU is 0.
#[unsafe(no_mangle)]
static NEXT_CPU: AtomicU32 = AtomicU32::new(1);
/// Where the stacks of the APs begin: CPU n has the n-th slot, ring 3 below ring 0.
#[unsafe(no_mangle)]
static AP_STACKS: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static page_directory_pointers: PageTable;
    static gdt: [AtomicU64; 8 + 2 * MAX_CPUS];
    static ap_start: u8;
    static ap_end: u8;
    static image_end: u8;
}

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .align 4
    .long 4, 8, 18                      # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

    .section .tables, "aw", @progbits
    .balign 4096
pml4:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
    .globl page_directory_pointers
page_directory_pointers:
    .quad PAGE_DIRECTORIES + 0x0007, PAGE_DIRECTORIES + 0x1007
    .quad PAGE_DIRECTORIES + 0x2007, PAGE_DIRECTORIES + 0x3007
    .fill 508, 8, 0

    .data
    .balign 16
    .globl gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            # 0x08 code, 32-bit
    .quad 0x00af9b000000ffff            # 0x10 code, 64-bit
    .quad 0x00cf93000000ffff            # 0x18 data
    .quad 0
    .quad 0x00cff3000000ffff            # 0x28 data, ring 3
    .quad 0x00affb000000ffff            # 0x30 code, ring 3
    .quad 0
    .quad 0x0000890000000000 + {tss_limit}  # 0x40 TSS of the boot CPU, base filled in below
    .quad 0
    .fill 2 * ({cpus} - 1), 8, 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad IDT

    .section .boot, "ax", @progbits
    .code32
    .globl pvh_start
pvh_start:
    movl $TASK_STATES, %eax
    movw %ax, gdt + 0x42
    shrl $16, %eax
    movb %al, gdt + 0x44
    movb %ah, gdt + 0x47
    movl $ring0_stack_end, TASK_STATES + 4
    movw $({cpus} * {tss_size}), TASK_STATES + 102
    lgdt gdt_pointer
    movl %ebx, %esi
    xorl %edi, %edi
    movl $ring3_stack_end, %esp
    movl ${entry}, %ebp
    jmp long_mode

ap_protected:
    movw $0x18, %ax
    movw %ax, %ds
    movl $1, %edi
    lock xaddl %edi, NEXT_CPU
    movl %edi, %eax
    imull ${ap_stack}, %eax, %eax
    addl AP_STACKS, %eax
    leal {ring3_stack}(%eax), %esp
    movl ${ap_entry}, %ebp

    # esp: stack for ring 3, ebp: function to call there, edi and esi: its arguments
long_mode:
    movl $0x620, %eax                   # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $0x100, %eax                    # LME
    wrmsr
    movl $0x80000033, %eax              # PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmp $0x10, $1f
    .code64
1:  movl $0x18, %eax
    movl %eax, %ss
    movl $0x2b, %eax
    movl %eax, %ds
    movl %eax, %es
    lidt idt_pointer
    movl %edi, %eax
    shll $4, %eax
    addl ${tss_selector}, %eax
    ltr %ax
    leaq -8(%rsp), %rcx                 # as after a call: the ABI wants rsp + 8 on 16 bytes
    pushq $0x2b
    pushq %rcx
    pushq $2
    pushq $0x33
    pushq %rbp
    iretq

    # Copied to TRAMPOLINE; runs there in real mode.
    .code16
    .globl ap_start, ap_end
ap_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl ap_gdt_pointer - ap_start
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $0x08, $ap_protected
ap_gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
ap_end:
    .code64

    .bss
    .balign 16
    .skip {ring3_stack}
ring3_stack_end:
    .skip {ring0_stack}
ring0_stack_end:
    "#,
    entry = sym crate::main,
    ap_entry = sym crate::smp::ap_main,
    cpus = const MAX_CPUS,
    tss_size = const TSS_SIZE,
    tss_limit = const tss_limit(0),
    tss_selector = const TSS_SELECTOR,
    ring3_stack = const RING3_STACK,
    ring0_stack = const RING0_STACK,
    ap_stack = const RING3_STACK + RING0_STACK,
    options(att_syntax)
);

const fn bitmap_offset(cpu: usize) -> usize {
    (MAX_CPUS - cpu) * TSS_SIZE
}

const fn tss_limit(cpu: usize) -> usize {
    bitmap_offset(cpu) + BITMAP - 1
}

/// Prepares stacks, task states and the trampoline for CPUs 1 to `cpus` - 1.
pub fn prepare_aps(cpus: usize) {
    let size = RING3_STACK + RING0_STACK;
    let stacks = &raw const image_end as usize;
    AP_STACKS.store(stacks as u64, Ordering::SeqCst);
    for cpu in 1..cpus.min(MAX_CPUS) {
        let state = &TASK_STATES.states[cpu];
        store(&state[4..12], (stacks + (cpu + 1) * size) as u64);
        store(&state[102..104], bitmap_offset(cpu) as u64);
        let base = &raw const TASK_STATES.states[cpu] as u64;
        let low = tss_limit(cpu) as u64 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        // SAFETY: `gdt` is the table above, of that size, and only atomics touch it.
        let gdt_entries = unsafe { &gdt };
        gdt_entries[8 + 2 * cpu].store(low, Ordering::SeqCst);
        gdt_entries[9 + 2 * cpu].store(base >> 32, Ordering::SeqCst);
    }
    let (start, end) = (&raw const ap_start, &raw const ap_end);
    // SAFETY: both symbols bound the trampoline; its destination is free low memory.
    unsafe { core::ptr::copy(start, TRAMPOLINE as *mut u8, end as usize - start as usize) };
}

/// First byte behind the image and the stacks of `cpus` CPUs.
pub fn used_end(cpus: usize) -> u64 {
    (&raw const image_end as usize + (cpus + 1) * (RING3_STACK + RING0_STACK)) as u64
}

fn store(bytes: &[AtomicU8], value: u64) {
    for (byte, value) in bytes.iter().zip(value.to_le_bytes()) {
        byte.store(value, Ordering::SeqCst);
    }
}

const SPARE: usize = 8;
static SPARE_DIRECTORIES: [PageTable; SPARE] =
    [const { PageTable([const { AtomicU64::new(0) }; 512]) }; SPARE];
static SPARE_USED: AtomicU16 = AtomicU16::new(0);

/// End of the addresses that can be mapped.
pub const REACH: u64 = 512 << 30;

/// Maps the GiB around `address` (below [`REACH`]) to itself. False when no table is left for it.
pub fn map(address: u64) -> bool {
    let gib = (address >> 30) as usize;
    // SAFETY: a page of the image, touched by atomics only.
    let pointers = unsafe { &page_directory_pointers };
    let Some(pointer) = pointers.0.get(gib) else { return false };
    if pointer.load(Ordering::SeqCst) != 0 {
        return true;
    }
    let Some(table) = SPARE_DIRECTORIES.get(SPARE_USED.fetch_add(1, Ordering::SeqCst) as usize) else {
        return false;
    };
    for (index, entry) in table.0.iter().enumerate() {
        entry.store((gib as u64) << 30 | (index as u64) << 21 | LARGE, Ordering::SeqCst);
    }
    pointer.store(table as *const PageTable as u64 | TABLE, Ordering::SeqCst);
    true
}

/// Shows the first GiB at another one (of [`REACH`]), too. False if something is there.
pub fn alias(gib: usize) -> bool {
    // SAFETY: a page of the image, touched by atomics only.
    let pointers = unsafe { &page_directory_pointers };
    let [first, ..] = &pointers.0;
    let Some(pointer) = pointers.0.get(gib) else { return false };
    pointer.compare_exchange(0, first.load(Ordering::SeqCst), Ordering::SeqCst, Ordering::SeqCst).is_ok()
}
