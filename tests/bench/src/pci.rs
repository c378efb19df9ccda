//! Enumeration of a full bus: 31 root ports beside the host bridge. QEMU's q35 needs firmware in real mode, which a KVM that
//! emulates kernel mode does not run (the guest starts on q35 under TCG only), so the reference is the PCIe bus of microvm.

use bulkhead_framework::Result;

use crate::host::Host;
use crate::machine::{Machine, Side};
use crate::report::{self, Samples};

const ROUNDS: usize = 7;
/// Enumerations of one guest.
const TIMES: u32 = 10;
/// Device 1f of ours belongs to nobody, so the last two ports share a device.
const PORTS: u32 = 31;
const FUNCTIONS: f64 = 32.0;
/// MiB.
const MEMORY: u32 = 256;

/// Measures and prints.
///
/// # Errors
/// A guest did not start.
pub fn run(host: &Host) -> Result<()> {
    host.needs_kvm()?;
    println!("  QEMU's is that of microvm: a KVM that emulates kernel mode does not run q35's firmware");
    let sides = [Side::Ours, Side::Qemu].map(|side| Machine::new(host, side, MEMORY, &ports()));
    let mut times: [Samples; 2] = Default::default();
    for _ in 0..ROUNDS {
        for (machine, samples) in sides.iter().zip(&mut times) {
            let outcome = machine.run(&format!("bench-pci rounds={TIMES}"))?;
            let found = outcome.number("functions")?;
            if found != FUNCTIONS {
                return Err(format!("{found} functions were found").into());
            }
            samples.value(outcome.time("all")? * 1e6 / f64::from(TIMES));
        }
    }
    let [ours, qemu] = &times;
    ours.print("one enumeration, ours", "ms", 1e-3);
    qemu.print("one enumeration, QEMU's", "ms", 1e-3);
    report::ratio("ours / QEMU's, time", ours.median(), qemu.median(), 1.0);
    let mut exits = [0.0; 2];
    for (machine, exits) in sides.iter().zip(&mut exits) {
        let [once, often] = [1, 1 + TIMES].map(|rounds| machine.exits(&format!("bench-pci rounds={rounds}")));
        *exits = (often? - once?) / f64::from(TIMES);
    }
    let [ours, qemu] = exits;
    println!("  {:<46} {ours:13.0}", "exits to user space, ours");
    println!("  {:<46} {qemu:13.0}", "exits to user space, QEMU's (kvm_run_exit)");
    report::ratio("ours / QEMU's, exits", ours, qemu, 1.0);
    Ok(())
}

/// The arguments.
fn ports() -> String {
    let port = |n: u32| {
        let address = match n {
            30 => ",multifunction=on,addr=1e.0".to_owned(),
            31 => ",addr=1e.1".to_owned(),
            n => format!(",addr={n:x}.0"),
        };
        format!("-device pcie-root-port,id=p{n},chassis={n},slot={n}{address}")
    };
    (1..=PORTS).map(port).collect::<Vec<_>>().join(" ")
}
