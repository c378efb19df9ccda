//! Debian's cloud kernel and its modules on this machine.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_framework::{Failure, Result};

/// The package that brings the kernel.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// One installed kernel.
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    modules: PathBuf,
    /// Module name to path below `modules` and the paths that it needs.
    dependencies: HashMap<String, (String, Vec<String>)>,
}

impl Kernel {
    /// The newest installed cloud kernel.
    ///
    /// # Errors
    /// None is installed.
    pub fn find() -> Result<Self> {
        let mut versions: Vec<String> = fs::read_dir("/boot")?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned()))
            .filter(|version| version.ends_with("-cloud-amd64"))
            .filter(|version| Path::new("/lib/modules").join(version).join("modules.dep").exists())
            .collect();
        versions.sort_by_key(|version| numbers(version));
        let version = versions.pop().ok_or_else(|| {
            Failure::new(format!("no Debian cloud kernel in /boot: apt-get install {PACKAGE}"))
        })?;
        let modules = Path::new("/lib/modules").join(&version);
        let dependencies = dependencies(&fs::read_to_string(modules.join("modules.dep"))?);
        Ok(Self { image: Path::new("/boot").join(format!("vmlinuz-{version}")), modules, dependencies })
    }

    /// The named modules and what they need, uncompressed, in loading order. What the kernel has built in is
    /// left out.
    ///
    /// # Errors
    /// A module is neither there nor built in.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        self.paths(names)?
            .into_iter()
            .map(|path| Ok((module_name(&path), uncompressed(&self.modules.join(path))?)))
            .collect()
    }

    /// The files that modprobe needs to load the named modules.
    ///
    /// # Errors
    /// As [`Kernel::modules`].
    pub fn files(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let indexes = fs::read_dir(&self.modules)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with("modules."));
        Ok(indexes.chain(self.paths(names)?).map(|path| self.modules.join(path)).collect())
    }

    /// The named modules and what they need, in loading order, as paths below the modules' directory.
    fn paths(&self, names: &[&str]) -> Result<Vec<String>> {
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let mut paths: Vec<String> = Vec::new();
        for name in names {
            match self.dependencies.get(&name.replace('-', "_")) {
                // modules.dep names what is needed first last.
                Some((path, needed)) => {
                    for path in needed.iter().rev().chain([path]) {
                        if !paths.contains(path) {
                            paths.push(path.clone());
                        }
                    }
                }
                None if builtin.lines().any(|path| module_name(path) == name.replace('-', "_")) => {}
                None => return Err(Failure::new(format!("{} has no module {name}", self.modules.display()))),
            }
        }
        Ok(paths)
    }
}

/// The numbers in a version, for ordering.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn dependencies(modules_dep: &str) -> HashMap<String, (String, Vec<String>)> {
    let line = |line: &str| {
        let (path, needed) = line.split_once(':')?;
        let needed = needed.split_whitespace().map(str::to_owned).collect();
        Some((module_name(path), (path.to_owned(), needed)))
    };
    modules_dep.lines().filter_map(line).collect()
}

/// `kernel/drivers/acpi/button.ko.xz` is `button`; the kernel takes `-` and `_` for the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn uncompressed(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).map_err(|error| Failure::new(format!("{}: {error}", path.display()))),
    };
    let output = Command::new(tool)
        .args(["-dc", "--"])
        .arg(path)
        .output()
        .map_err(|error| Failure::new(format!("{tool} for {}: {error}", path.display())))?;
    if !output.status.success() {
        return Err(Failure::new(format!(
            "{tool} {}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr)
        )));
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_by_number() {
        assert!(numbers("6.1.0-56-cloud-amd64") > numbers("6.1.0-9-cloud-amd64"));
        assert!(numbers("6.12.1-cloud-amd64") > numbers("6.1.99-cloud-amd64"));
    }

    #[test]
    fn modules_are_uncompressed() {
        let scratch = bulkhead_framework::Scratch::new().unwrap();
        let path = scratch.path().join("a.ko");
        fs::write(&path, b"module").unwrap();
        assert_eq!(uncompressed(&path).unwrap(), b"module");
        assert!(Command::new("xz").arg(&path).status().unwrap().success());
        assert_eq!(uncompressed(&scratch.path().join("a.ko.xz")).unwrap(), b"module");
        assert!(uncompressed(&path).unwrap_err().message().contains("a.ko"));
    }

    #[test]
    fn reads_modules_dep() {
        let found = dependencies(
            "kernel/a/kvm-amd.ko.xz: kernel/a/kvm.ko.xz kernel/v/irqbypass.ko.xz\nkernel/b.ko:\n",
        );
        let (path, needed) = found.get("kvm_amd").unwrap();
        assert_eq!(path, "kernel/a/kvm-amd.ko.xz");
        assert_eq!(needed.len(), 2);
        assert!(found.get("b").unwrap().1.is_empty());
    }
}
