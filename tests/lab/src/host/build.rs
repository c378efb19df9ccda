//! Builds with cargo what L1 is to run.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_framework::{Failure, Result, target_dir};
use serde_json::Value;

/// The crates whose tests need a KVM, and nothing else that L1 lacks.
const NATIVE_TESTS: [&str; 2] = ["bulkhead-native-tests", "bulkhead-core"];

/// What L1 is.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Other people's back ends from crates.io, with their versions.
const BACK_ENDS: [(&str, &str); 2] = [("vhost-device-rng", "0.1.0"), ("vhost-device-vsock", "0.3.0")];

/// Builds the back ends of crates.io, once, and returns their paths. They are static: Debian 12 runs them, whatever the
/// host is.
///
/// # Errors
/// The build fails; cargo has said why on standard error.
pub fn back_ends() -> Result<Vec<PathBuf>> {
    let root = target_dir().join("lab").join("back-ends");
    let mut paths = Vec::new();
    for (name, version) in BACK_ENDS {
        let to = root.join(format!("{name}-{version}"));
        let path = to.join("bin").join(name);
        if !path.exists() {
            println!("lab: building {name}");
            let mut command = Command::new(program());
            command.args([
                "install",
                "--quiet",
                "--locked",
                "--debug",
                "--target",
                TARGET,
                "--version",
                version,
            ]);
            command.arg("--target-dir").arg(root.join("build")).arg("--root").arg(to).arg(name);
            command.env("RUSTFLAGS", "-Ctarget-feature=+crt-static").env("CARGO_PROFILE_DEV_DEBUG", "0");
            finish(&mut command, "install")?;
        }
        paths.push(path);
    }
    Ok(paths)
}

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
    finish(Command::new(program()).args(args), args.first().unwrap_or(&""))
}

fn program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Runs cargo and returns its output.
fn finish(command: &mut Command, what: &str) -> Result<Vec<u8>> {
    let output = command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::new(format!("cannot run cargo: {error}")))?;
    if output.status.success() { Ok(output.stdout) } else { Err(format!("cargo {what} failed").into()) }
}
