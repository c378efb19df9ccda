//! `qapi/machine.json`.

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_enum! {
    /// Kind of a CPU, superseded by [`SysEmuTarget`].
    CpuInfoArch {
        /// Any x86.
        "x86" X86,
        /// SPARC.
        "sparc" Sparc,
        /// PowerPC.
        "ppc" Ppc,
        /// MIPS.
        "mips" Mips,
        /// TriCore.
        "tricore" Tricore,
        /// s390.
        "s390" S390,
        /// RISC-V.
        "riscv" Riscv,
        /// Any other.
        "other" Other,
    }
}

qapi_enum! {
    /// Target architecture, by the name of QEMU's binary.
    #[expect(missing_docs, reason = "each is the architecture of its name")]
    SysEmuTarget {
        "aarch64" Aarch64,
        "alpha" Alpha,
        "arm" Arm,
        "avr" Avr,
        "cris" Cris,
        "hppa" Hppa,
        "i386" I386,
        "lm32" Lm32,
        "m68k" M68k,
        "microblaze" Microblaze,
        "microblazeel" Microblazeel,
        "mips" Mips,
        "mips64" Mips64,
        "mips64el" Mips64el,
        "mipsel" Mipsel,
        "moxie" Moxie,
        "nios2" Nios2,
        "or1k" Or1k,
        "ppc" Ppc,
        "ppc64" Ppc64,
        "riscv32" Riscv32,
        "riscv64" Riscv64,
        "rx" Rx,
        "s390x" S390x,
        "sh4" Sh4,
        "sh4eb" Sh4eb,
        "sparc" Sparc,
        "sparc64" Sparc64,
        "tricore" Tricore,
        "unicore32" Unicore32,
        "x86_64" X86_64,
        "xtensa" Xtensa,
        "xtensaeb" Xtensaeb,
    }
}

qapi_struct! {
    /// Place of a vCPU.
    CpuInstanceProperties {
        /// NUMA node.
        "node-id" node_id: Option<i64>,
        /// Socket on the board.
        "socket-id" socket_id: Option<i64>,
        /// Die in the socket.
        "die-id" die_id: Option<i64>,
        /// Core in the die.
        "core-id" core_id: Option<i64>,
        /// Thread in the core.
        "thread-id" thread_id: Option<i64>,
    }
}

qapi_enum! {
    /// State of an s390 vCPU.
    CpuS390State {
        /// Not set up.
        "uninitialized" Uninitialized,
        /// Stopped.
        "stopped" Stopped,
        /// Stopped by a check.
        "check-stop" CheckStop,
        /// Running.
        "operating" Operating,
        /// Loading.
        "load" Load,
    }
}

qapi_struct! {
    /// What an s390 vCPU adds.
    CpuInfoS390 {
        /// Its state.
        "cpu-state" cpu_state: CpuS390State,
    }
}

qapi_struct! {
    /// A vCPU.
    CpuInfoFast {
        /// Its index.
        "cpu-index" cpu_index: i64,
        /// Its path in QEMU's object tree.
        "qom-path" qom_path: String,
        /// Host thread that runs it.
        "thread-id" thread_id: i64,
        /// Its place.
        "props" props: Option<CpuInstanceProperties>,
        /// Its kind.
        "arch" arch: CpuInfoArch ["deprecated"],
        /// Its architecture.
        "target" target: SysEmuTarget,
    } by "target" { "s390x" => CpuInfoS390, }
}
