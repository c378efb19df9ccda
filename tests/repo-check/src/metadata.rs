//! What `cargo metadata` says.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// The workspace's packages, with or without all those that they depend on.
pub fn packages(dependencies: bool) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version", "1"]).current_dir(root());
    if !dependencies {
        command.arg("--no-deps");
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let mut metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata.get_mut("packages").unwrap().as_array_mut().unwrap().drain(..).collect()
}

/// A string member; empty if there is none.
pub fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The top of the repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}
