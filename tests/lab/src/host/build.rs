//! Builds with cargo what L1 is to run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_framework::{Failure, Result};
use serde_json::Value;

/// The crates whose tests need a KVM, and nothing else that L1 lacks.
const NATIVE_TESTS: [&str; 2] = ["bulkhead-native-tests", "bulkhead-core"];

/// Builds the product's programs with the release profile and returns their paths.
///
/// # Errors
/// The build fails; cargo has said why on standard error.
pub fn product() -> Result<Vec<PathBuf>> {
    let packages = product_packages()?;
    let mut args = vec!["build", "--release", "--bins"];
    args.extend(packages.iter().flat_map(|package| ["-p", package]));
    executables(&args, |message| message.pointer("/target/kind/0") == Some(&Value::from("bin")))
}

/// Builds the test programs that need a KVM and returns their paths.
///
/// # Errors
/// As [`product`].
pub fn native_tests() -> Result<Vec<PathBuf>> {
    let mut args = vec!["test", "--no-run"];
    args.extend(NATIVE_TESTS.iter().flat_map(|package| ["-p", package]));
    executables(&args, |message| message.pointer("/profile/test") == Some(&Value::Bool(true)))
}

/// The workspace's packages outside tests/.
fn product_packages() -> Result<Vec<String>> {
    let output = cargo(&["metadata", "--no-deps", "--format-version", "1"])?;
    let metadata: Value =
        serde_json::from_slice(&output).map_err(|error| format!("cargo metadata: {error}"))?;
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let tests = Path::new(&text(&metadata, "workspace_root")).join("tests");
    let packages = metadata.get("packages").and_then(Value::as_array).cloned().unwrap_or_default();
    let product = |package: &&Value| !Path::new(&text(package, "manifest_path")).starts_with(&tests);
    Ok(packages.iter().filter(product).map(|package| text(package, "name")).collect())
}

/// Runs a cargo build and returns the executables whose message satisfies `wanted`.
fn executables(args: &[&str], wanted: impl Fn(&Value) -> bool) -> Result<Vec<PathBuf>> {
    let output = cargo(&[args, &["--message-format=json-render-diagnostics"]].concat())?;
    let messages =
        output.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    Ok(messages
        .filter(wanted)
        .filter_map(|message| message.get("executable").and_then(Value::as_str).map(PathBuf::from))
        .collect())
}

fn cargo(args: &[&str]) -> Result<Vec<u8>> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::new(format!("cannot run cargo: {error}")))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("cargo {} failed", args.join(" ")).into())
    }
}
