//! Compiles `program/` into the guest's ELF: a freestanding static program for the host's own target.

use std::{env, path::Path, process::Command};

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=program");
    println!("cargo:rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let out = Path::new(&variable("OUT_DIR")?).join("guest.elf");
    let script = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("program/link.ld");
    let status = Command::new(variable("RUSTC")?)
        .args(["--edition=2024", "--crate-type=bin", "--crate-name=guest", "program/main.rs"])
        .args(["--target=x86_64-unknown-linux-gnu", "-Cpanic=abort", "-Copt-level=s"])
        .args(["-Crelocation-model=static", "-Ccodegen-units=1", "-Cstrip=symbols"])
        .args(["-Clink-args=-nostartfiles -nostdlib -static -no-pie -Wl,--build-id=none"])
        .args(["-Clink-args=-Wl,-zmax-page-size=0x1000"])
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&out)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("rustc cannot build the native guest: {status}")),
        Err(error) => Err(format!("rustc: {error}")),
    }
}
