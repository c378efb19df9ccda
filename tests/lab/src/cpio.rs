//! Writes initramfs archives (Linux, Documentation/driver-api/early-userspace/buffer-format.rst, "newc").

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive in the making. Parent directories appear by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, mode 755.
    pub fn directory(&mut self, path: &str) {
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        self.parent(path);
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        self.directories.insert(path.to_owned());
    }

    /// Adds a file of root's, executable for all or readable by all.
    pub fn file(&mut self, path: &str, executable: bool, content: &[u8]) {
        self.parent(path);
        self.entry(path, FILE | if executable { 0o755 } else { 0o644 }, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parent(path);
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds /dev/console, which the kernel opens for init before anything is mounted.
    pub fn console(&mut self) {
        self.directory("dev");
        self.entry("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
    }

    /// The complete archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (major, minor) = device;
        let size = content.len();
        let name_size = path.len() + 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{name_size:08x}{:08x}",
            self.entries, 0, 0, 1, 0, 0, 0, 0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_reads_back_with_cpio() {
        let mut archive = Archive::default();
        archive.console();
        archive.file("usr/bin/tool", true, b"12345");
        archive.file("usr/bin/other", false, b"");
        archive.link("bin", "usr/bin");
        let scratch = bulkhead_framework::Scratch::new().unwrap();
        let file = scratch.path().join("a.cpio");
        std::fs::write(&file, archive.finish()).unwrap();
        let mut list = std::process::Command::new("busybox");
        let output = list.args(["cpio", "-tv"]).stdin(std::fs::File::open(file).unwrap()).output().unwrap();
        let listing = String::from_utf8(output.stdout).unwrap();
        let entries: Vec<(&str, &str)> = listing
            .lines()
            .map(|line| (line.split_whitespace().next().unwrap(), line.rsplit("00:00:00 ").next().unwrap()))
            .collect();
        let expected = [
            ("drwxr-xr-x", "dev"),
            ("crw-------", "dev/console"),
            ("drwxr-xr-x", "usr"),
            ("drwxr-xr-x", "usr/bin"),
            ("-rwxr-xr-x", "usr/bin/tool"),
            ("-rw-r--r--", "usr/bin/other"),
            ("lrwxrwxrwx", "bin -> usr/bin"),
        ];
        assert_eq!(entries, expected);
    }
}
