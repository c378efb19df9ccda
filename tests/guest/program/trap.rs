//! Ring 0: interrupt gates, exceptions, and the few services that ring 3 asks for.
//!
//! A service is called by a breakpoint (`int3`): where ring 0 is emulated, `int n` from ring 3 ends in
//! an invalid-opcode exception.
//!
//! All of it is assembly of simple instructions, because a KVM may emulate it. An interrupt only counts
//! itself (and acknowledges one status port where its source needs that); ring 3 acts on the counters.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Vector of ISA interrupt 0 and of GSI 0; GSI n is at 32 + n.
pub const GSI_BASE: u8 = 32;
/// First vector of message signalled interrupts.
pub const MSI_BASE: u8 = 64;
/// How many of them there are.
pub const MSI_COUNT: u8 = 64;
const VECTORS: usize = MSI_BASE as usize + MSI_COUNT as usize;
const NMI: usize = 2;
const BREAKPOINT: usize = 3;

#[repr(C, align(4096))]
struct Idt([[AtomicU64; 2]; 256]);

#[unsafe(no_mangle)]
static IDT: Idt = Idt([const { [const { AtomicU64::new(0) }; 2] }; 256]);
/// How often each vector fired.
#[unsafe(no_mangle)]
static IRQ_COUNT: [AtomicU32; VECTORS] = [const { AtomicU32::new(0) }; VECTORS];
/// Status port (16 bits, write 1 to clear) to acknowledge for a vector; 0 for none.
#[unsafe(no_mangle)]
static IRQ_PORT: [AtomicU16; VECTORS] = [const { AtomicU16::new(0) }; VECTORS];
/// What was read there.
#[unsafe(no_mangle)]
static IRQ_SEEN: [AtomicU16; VECTORS] = [const { AtomicU16::new(0) }; VECTORS];

unsafe extern "C" {
    static stubs: u8;
    static service_gate: u8;
}

const STUB_SIZE: usize = 16;

global_asm!(
    r#"
    .text
    .balign 16
    .globl stubs, service_gate
stubs:
    vector = 0
    .rept 32
    .balign 16
    .if vector == 2
    lock incl IRQ_COUNT + 8
    iretq
    .else
    .if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17
    pushq $0
    .endif
    pushq $vector
    jmp exception
    .endif
    vector = vector + 1
    .endr
    .rept {vectors} - 32
    .balign 16
    pushq %rax
    movl $vector, %eax
    jmp interrupt
    vector = vector + 1
    .endr
    .balign 16

interrupt:
    pushq %rcx
    pushq %rdx
    movl %eax, %ecx
    lock incl IRQ_COUNT(, %rcx, 4)
    movzwl IRQ_PORT(, %rcx, 2), %edx
    testl %edx, %edx
    jz 1f
    inw %dx, %ax
    orw %ax, IRQ_SEEN(, %rcx, 2)
    outw %ax, %dx
1:  movl $0xfee000b0, %edx              # local APIC, end of interrupt
    movl $0, (%rdx)
    popq %rdx
    popq %rcx
    popq %rax
    iretq

    # Goes on in ring 3, in crate::trap::report(vector, error code, rip, cr2).
exception:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movl ${report}, %eax
    movq %rax, (%rsp)
    movq $0x33, 8(%rsp)
    movq $2, 16(%rsp)
    movq 24(%rsp), %rax
    andq $-16, %rax
    subq $136, %rax
    movq %rax, 24(%rsp)
    movq $0x2b, 32(%rsp)
    iretq

    # rax: service; rdi, rsi: arguments
service_gate:
    jmpq *services(, %rax, 8)
wait:
    cmpl %esi, (%rdi)
    jne 1f
    sti
    hlt
    cli
1:  iretq
halt:
    hlt
    jmp halt
enable:
    orq $0x200, 16(%rsp)
    iretq
disable:
    andq $-0x201, 16(%rsp)
    iretq
identify:
    movl %edi, %eax
    movl %esi, %ecx
    movq %rbx, %rdi
    cpuid
    xchgq %rbx, %rdi                    # ebx goes back in edi
    iretq
triple_fault:
    lidt no_idt
    movabsq 0x7ffffff000, %rax          # not mapped
    jmp triple_fault
    # What no KVM can run: an instruction its emulator lacks, where it emulates, and code fetched from MMIO.
derail:
    lock cmpxchg16b (%rsi)
    jmpq *%rdi

    .section .rodata, "a", @progbits
    .balign 8
services:
    .quad wait, halt, enable, disable, identify, triple_fault, derail
no_idt:
    .word 0
    .quad 0
    .text
    "#,
    report = sym report,
    vectors = const VECTORS,
    options(att_syntax)
);

fn service(number: u64, first: u64, second: u64) {
    // SAFETY: every service but `identify` returns with all registers as they were, or never.
    unsafe { asm!("int3", in("rax") number, in("rdi") first, in("rsi") second) };
}

/// Fills the IDT. Interrupts stay off until [`enable`].
pub fn init() {
    for vector in 0..VECTORS {
        gate(vector, &raw const stubs as usize + vector * STUB_SIZE, 0);
    }
    gate(BREAKPOINT, &raw const service_gate as usize, 3);
}

fn gate(vector: usize, handler: usize, level: u64) {
    let handler = handler as u64;
    let low = handler & 0xffff | 0x10 << 16 | (0x8e | level << 5) << 40 | (handler >> 16 & 0xffff) << 48;
    IDT.0[vector][0].store(low, Ordering::SeqCst);
    IDT.0[vector][1].store(handler >> 32, Ordering::SeqCst);
}

/// The counter of a GSI's interrupts.
pub fn gsi_counter(gsi: u8) -> &'static AtomicU32 {
    &IRQ_COUNT[(GSI_BASE + gsi) as usize % VECTORS]
}

/// The counter of the n-th message signalled interrupt.
pub fn msi_counter(number: u8) -> &'static AtomicU32 {
    &IRQ_COUNT[(MSI_BASE + number % MSI_COUNT) as usize % VECTORS]
}

/// The counter of non-maskable interrupts.
pub fn nmi_counter() -> &'static AtomicU32 {
    &IRQ_COUNT[NMI]
}

/// Makes the handler of `gsi` read the status register at `port` and write back what it read.
pub fn acknowledge_at(gsi: u8, port: u16) {
    IRQ_PORT[(GSI_BASE + gsi) as usize % VECTORS].store(port, Ordering::SeqCst);
}

/// The status bits seen since the last call.
pub fn take_status(gsi: u8) -> u16 {
    IRQ_SEEN[(GSI_BASE + gsi) as usize % VECTORS].swap(0, Ordering::SeqCst)
}

/// Halts this CPU until its next interrupt, unless `counter` has already moved on from `seen`.
pub fn wait(counter: &AtomicU32, seen: u32) {
    service(0, counter as *const AtomicU32 as u64, seen.into());
}

/// Halts this CPU with interrupts off.
pub fn halt() -> ! {
    loop {
        disable();
        service(1, 0, 0);
    }
}

/// Interrupts on for this CPU.
pub fn enable() {
    service(2, 0, 0);
}

/// Interrupts off for this CPU.
pub fn disable() {
    service(3, 0, 0);
}

/// CPUID from ring 0, where every KVM answers with the guest's own values: eax, ebx, ecx, edx.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u64, u64, u64, u64);
    // SAFETY: the service changes these registers and no other.
    unsafe {
        asm!("int3", inout("rax") 4u64 => a, inout("rdi") u64::from(leaf) => b,
            in("rsi") u64::from(subleaf), out("rcx") c, out("rdx") d);
    }
    [a as u32, b as u32, c as u32, d as u32]
}

/// Takes an exception with no IDT: the CPU shuts down.
pub fn triple_fault() -> ! {
    service(5, 0, 0);
    halt()
}

/// Runs in ring 0 what KVM cannot emulate: ends in KVM_EXIT_INTERNAL_ERROR. `mmio` is backed by nothing.
pub fn derail(mmio: u64) -> ! {
    #[repr(align(16))]
    struct Operand([AtomicU64; 2]);
    static OPERAND: Operand = Operand([const { AtomicU64::new(0) }; 2]);
    service(6, mmio, OPERAND.0.as_ptr() as u64);
    halt()
}

extern "C" fn report(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    crate::println!("exception {vector} error {error:#x} rip {rip:#x} cr2 {cr2:#x}");
    halt()
}
