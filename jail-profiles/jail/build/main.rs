//! Turns `topology.toml` and `profiles/*.toml` into constants: no process parses them at run time.

mod profile;
mod topology;

use std::{env, fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("..");
    println!("cargo::rerun-if-changed=../topology.toml");
    println!("cargo::rerun-if-changed=../profiles");
    let generated = topology::generate(root)?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("topology.rs"), generated)?;
    Ok(())
}
