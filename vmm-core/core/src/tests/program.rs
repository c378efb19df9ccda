//! Small guest programs in 32-bit protected mode without paging, entered as PVH.

/// Where programs are loaded and entered.
pub const CODE: u32 = 0x1000;
/// Where programs leave their results.
pub const RESULTS: u32 = 0x8000;

/// A program in the making.
#[derive(Clone, Debug, Default)]
pub struct Program(Vec<u8>);

impl Program {
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn imm(self, opcode: &[u8], value: u32) -> Self {
        self.raw(opcode).raw(&value.to_le_bytes())
    }

    fn port(self, port: u16) -> Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()) // mov dx, port
    }

    /// `mov al, value; out port, al`
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.raw(&[0xb0, value]).port(port).raw(&[0xee])
    }

    /// `out port, al`
    pub fn out_al(self, port: u16) -> Self {
        self.port(port).raw(&[0xee])
    }

    /// `in al|eax, port; mov [RESULTS + at], eax`
    pub fn in8(self, port: u16, at: u32) -> Self {
        self.imm(&[0xb8], 0).port(port).raw(&[0xec]).store(at)
    }

    pub fn in32(self, port: u16, at: u32) -> Self {
        self.port(port).raw(&[0xed]).store(at)
    }

    /// `mov eax, [addr]; mov [RESULTS + at], eax`
    pub fn load(self, addr: u32, at: u32) -> Self {
        self.imm(&[0xa1], addr).store(at)
    }

    /// `mov [RESULTS + at], eax`
    pub fn store(self, at: u32) -> Self {
        self.imm(&[0xa3], RESULTS + at)
    }

    /// `mov dword [addr], value`
    pub fn poke(self, addr: u32, value: u32) -> Self {
        self.imm(&[0xc7, 0x05], addr).raw(&value.to_le_bytes())
    }

    /// `inc dword [RESULTS + at]`
    pub fn count(self, at: u32) -> Self {
        self.imm(&[0xff, 0x05], RESULTS + at)
    }

    /// Jumps back to the start.
    pub fn again(self) -> Self {
        let back = u32::try_from(self.0.len() + 5).unwrap().wrapping_neg();
        self.imm(&[0xe9], back)
    }

    /// Halts for good.
    pub fn halt(self) -> Self {
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// Jumps to `addr` (through eax).
    pub fn jump(self, addr: u32) -> Self {
        self.imm(&[0xb8], addr).raw(&[0xff, 0xe0])
    }

    /// `mov ax, 0x100; mov ds, ax`: a bad selector without an interrupt table, so a triple fault.
    pub fn triple_fault(self) -> Self {
        self.raw(&[0x66, 0xb8, 0x00, 0x01, 0x8e, 0xd8])
    }
}
