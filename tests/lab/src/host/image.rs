//! What L1 boots from: the programs under test, the KVM modules and the Debian guest, with busybox in an initramfs or
//! with systemd on a disk.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_framework::{Failure, Result, Scratch};

use super::kernel::Kernel;
use super::systemd;
use crate::cpio::Archive;
use crate::paths;

/// Modules that make /dev/kvm in L1.
pub const L1_MODULES: [&str; 1] = ["kvm-amd"];

/// What else it needs: TAP interfaces.
pub const L1_DEVICES: [&str; 1] = ["tun"];

/// Modules through which the Debian guest reports its power button.
const L2_MODULES: [&str; 2] = ["button", "evdev"];

/// Modules for its virtio devices.
const L2_VIRTIO: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtiofs",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];

/// Other people's back ends: Debian packages qemu-system-common, qemu-utils (see tests/setup.sh). Name and places.
const BACK_ENDS: [(&str, &[&str]); 2] = [
    ("qemu-storage-daemon", &["/usr/bin/qemu-storage-daemon"]),
    ("virtiofsd", &["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"]),
];

/// What QEMU's q35 needs to start a kernel: Debian packages seabios, qemu-system-data.
const QEMU_FIRMWARE: [&str; 3] =
    ["usr/share/seabios/bios-256k.bin", "usr/share/qemu/linuxboot_dma.bin", "usr/share/qemu/kvmvapic.bin"];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1000:an ordinary user:/tmp:/bin/sh\n";
const GROUP: &str = "root:x:0:\nkvm:x:100:tester\ntester:x:1000:\n";

/// What to put into L1.
pub struct Content {
    /// The product's programs, for /usr/bin or where it installs them.
    pub programs: Vec<PathBuf>,
    /// Other people's static programs for /usr/bin.
    pub back_ends: Vec<PathBuf>,
    /// Test programs for [`paths::TESTS`].
    pub tests: Vec<PathBuf>,
    /// Debian's QEMU, too.
    pub qemu: bool,
    /// A directory tree to lay over the root: tools for a look around.
    pub overlay: Option<PathBuf>,
}

impl Content {
    /// Hands over each program with its path in L1, without the leading `/`.
    ///
    /// # Errors
    /// A program cannot be read, or what `add` returns.
    pub fn each_program(&self, mut add: impl FnMut(&str, Vec<u8>) -> Result<()>) -> Result<()> {
        add("usr/bin/bulkhead-lab", read(&std::env::current_exe()?)?)?;
        let tests = paths::TESTS.trim_start_matches('/');
        for (dir, files) in [("usr/bin", &self.programs), ("usr/bin", &self.back_ends), (tests, &self.tests)]
        {
            for file in files {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                add(&format!("{dir}/{name}"), read(file)?)?;
            }
        }
        Ok(())
    }
}

/// What the first program of an L1 is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A shell script of busybox, in an initramfs.
    Busybox,
    /// systemd, on a disk.
    Systemd,
}

/// The kernel of an L1 and its initramfs or disk. The file goes with the value.
pub struct Image {
    /// What boots from it.
    pub kind: Kind,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs or disk.
    pub file: PathBuf,
}

impl Image {
    /// Writes the image below `dir`.
    ///
    /// # Errors
    /// Something that belongs into it is missing.
    pub fn build(kind: Kind, content: &Content, dir: &Path) -> Result<Self> {
        let kernel = Kernel::find()?;
        let file = match kind {
            Kind::Busybox => initramfs(&kernel, content, dir)?,
            Kind::Systemd => systemd::disk(&kernel, content, dir)?,
        };
        Ok(Self { kind, kernel: kernel.image, file })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A file that stays behind costs disk space only.
        let _ = fs::remove_file(&self.file);
    }
}

/// Writes the initramfs with busybox.
fn initramfs(kernel: &Kernel, content: &Content, dir: &Path) -> Result<PathBuf> {
    let busybox = Busybox::find()?;
    let mut archive = Archive::default();
    archive.console();
    busybox.add_to(&mut archive);
    archive.file("init", true, include_bytes!("init-l1"));
    archive.file("etc/passwd", false, PASSWD.as_bytes());
    archive.file("etc/group", false, GROUP.as_bytes());
    archive.directory("new");
    add_modules(&mut archive, "modules", kernel, &[&L1_MODULES[..], &L1_DEVICES].concat())?;
    let mut added = BTreeSet::new();
    add_back_ends(&mut archive, &mut added)?;
    if content.qemu {
        add_program(
            &mut archive,
            &mut added,
            "qemu-system-x86_64",
            Path::new("/usr/bin/qemu-system-x86_64"),
        )?;
        for file in QEMU_FIRMWARE {
            archive.file(file, false, &read(&Path::new("/").join(file))?);
        }
    }
    archive.file(paths::ROOT.trim_start_matches('/'), false, &guest_root(&busybox, dir)?);
    archive.file(paths::KERNEL.trim_start_matches('/'), false, &read(&kernel.image)?);
    archive.file(paths::INITRD.trim_start_matches('/'), false, &guest_initrd(kernel)?);
    content.each_program(|path, bytes| {
        archive.file(path, true, &bytes);
        Ok(())
    })?;
    if let Some(overlay) = &content.overlay {
        add_tree(&mut archive, overlay, "")?;
    }
    let initramfs = dir.join(format!("l1-{}.cpio", std::process::id()));
    fs::write(&initramfs, archive.finish())
        .map_err(|error| Failure::new(format!("{}: {error}", initramfs.display())))?;
    Ok(initramfs)
}

/// Debian's kernel and, written below `dir`, the initrd of the Debian guest, for a host that can run it.
///
/// # Errors
/// As [`Image::build`].
pub fn debian(dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let kernel = Kernel::find()?;
    let initrd = dir.join("initrd");
    fs::write(&initrd, guest_initrd(&kernel)?)?;
    Ok((kernel.image, initrd))
}

/// The initrd of the Debian guest.
///
/// # Errors
/// busybox or a module is missing.
pub fn guest_initrd(kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.console();
    Busybox::find()?.add_to(&mut archive);
    archive.file("init", true, include_bytes!("init-l2"));
    for directory in ["proc", "sys"] {
        archive.directory(directory);
    }
    add_modules(&mut archive, "modules", kernel, &L2_MODULES)?;
    add_modules(&mut archive, "virtio", kernel, &L2_VIRTIO)?;
    Ok(archive.finish())
}

/// A root file system of the Debian guest with busybox, made below `dir`.
fn guest_root(busybox: &Busybox, dir: &Path) -> Result<Vec<u8>> {
    let scratch = Scratch::new()?;
    let tree = scratch.path().join("root");
    for name in ["bin", "dev", "proc", "sys", "mnt"] {
        fs::create_dir_all(tree.join(name))?;
    }
    fs::write(tree.join("bin/busybox"), &busybox.content)?;
    for applet in busybox.applets.iter().filter(|applet| !["busybox", "init"].contains(&applet.as_str())) {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    symlink("bin", tree.join("sbin"))?;
    fs::write(tree.join("bin/init"), include_bytes!("init-root"))?;
    for program in ["bin/busybox", "bin/init"] {
        fs::set_permissions(tree.join(program), fs::Permissions::from_mode(0o755))?;
    }
    let image = dir.join(format!("root-{}.img", std::process::id()));
    let program = ["/sbin/mke2fs", "/usr/sbin/mke2fs"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap_or("mke2fs");
    let made = Command::new(program)
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0", "-d"])
        .arg(&tree)
        .arg(&image)
        .arg("24M")
        .output()
        .map_err(|error| Failure::new(format!("{program}: {error}")))?;
    if !made.status.success() {
        return Err(Failure::new(format!("{program}: {}", String::from_utf8_lossy(&made.stderr))));
    }
    let content = read(&image)?;
    fs::remove_file(&image)?;
    Ok(content)
}

/// Adds other people's back ends.
fn add_back_ends(archive: &mut Archive, added: &mut BTreeSet<String>) -> Result<()> {
    for (name, places) in BACK_ENDS {
        let place = places.iter().map(Path::new).find(|place| place.exists());
        let place = place.ok_or_else(|| Failure::new(format!("no {name}: run tests/setup.sh")))?;
        add_program(archive, added, name, place)?;
    }
    Ok(())
}

/// Adds a program of the host and those of the libraries that it is linked with that are not there yet.
fn add_program(archive: &mut Archive, added: &mut BTreeSet<String>, name: &str, place: &Path) -> Result<()> {
    archive.file(&format!("usr/bin/{name}"), true, &read(place)?);
    let output = Command::new("ldd").arg(place).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        if added.insert(library.to_owned()) {
            archive.file(library.trim_start_matches('/'), true, &read(Path::new(library))?);
        }
    }
    Ok(())
}

/// Adds modules to a directory, under names that sort in loading order.
fn add_modules(archive: &mut Archive, dir: &str, kernel: &Kernel, names: &[&str]) -> Result<()> {
    for (index, (name, content)) in kernel.modules(names)?.into_iter().enumerate() {
        archive.file(&format!("{dir}/{index:02}-{name}.ko"), false, &content);
    }
    Ok(())
}

fn add_tree(archive: &mut Archive, dir: &Path, below: &str) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|error| Failure::new(format!("{}: {error}", dir.display())))? {
        let entry = entry?;
        let path = format!("{below}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            add_tree(archive, &entry.path(), &format!("{path}/"))?;
        } else if kind.is_symlink() {
            archive.link(&path, &fs::read_link(entry.path())?.to_string_lossy());
        } else {
            archive.file(&path, entry.metadata()?.permissions().mode() & 0o111 != 0, &read(&entry.path())?);
        }
    }
    Ok(())
}

/// The content of a file.
///
/// # Errors
/// It cannot be read; the failure names it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

/// Debian's static busybox.
pub struct Busybox {
    /// The program.
    pub content: Vec<u8>,
    applets: Vec<String>,
}

impl Busybox {
    /// The one that is installed.
    ///
    /// # Errors
    /// None is.
    pub fn find() -> Result<Self> {
        let missing = || Failure::new("no busybox: apt-get install busybox-static");
        let path = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
        let path = path.ok_or_else(missing)?;
        let output = Command::new(path).arg("--list").output().map_err(|_| missing())?;
        let applets = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        Ok(Self { content: read(path)?, applets })
    }

    /// Adds the program and a link for each of its applets.
    fn add_to(&self, archive: &mut Archive) {
        archive.file("bin/busybox", true, &self.content);
        for applet in self.applets.iter().filter(|applet| *applet != "busybox") {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
        archive.link("sbin", "bin");
    }
}
