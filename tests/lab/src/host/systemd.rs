//! What the L1 with systemd boots from: a disk with Debian's packages, the lab's agent and the programs under test.
//!
//! The packages are unpacked and not configured: that needs no privileges and no chroot, and what their scripts would
//! have set up (users, the machine's identity, links) is written here, as much of it as the lab needs. Everything on the
//! disk belongs to root. The tarball does not depend on the kernel, whose modules are added for each run.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_framework::{Failure, Result, target_dir};

use super::image::{Busybox, Content, L1_DEVICES, L1_MODULES, guest_initrd, read};
use super::kernel::Kernel;
use crate::paths;

/// The release whose systemd (252) the units have to work with, whatever the host runs.
const SUITE: &str = "bookworm";

/// What the root is made of; dependencies come by themselves.
const PACKAGES: &str =
    "systemd,systemd-sysv,libnss-systemd,kmod,coreutils,dash,util-linux,mount,grep,procps,libc-bin";

/// Two thirds of the files, and nobody reads them here.
const EXCLUDED: [&str; 2] = ["/usr/share/*", "/usr/lib/x86_64-linux-gnu/perl*"];

/// Another mirror than deb.debian.org. apt takes a proxy from `http_proxy`.
const MIRROR: &str = "LAB_MIRROR";

/// Seconds that the packages may take; on an ordinary line it is 20.
const FETCH: &str = "300";

/// Size of the disk: twice what is on it.
const DISK: &str = "384M";

/// What the kernel must have built in: this L1 has no initramfs that could load it.
const BUILT_IN: [&str; 2] = ["nvme", "ext4"];

/// Units that cost time at boot and do nothing for the lab, and those for devices that this L1 does not have.
const MASKED: &[&str] = &[
    "getty.target",
    "systemd-logind.service",
    "systemd-user-sessions.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-random-seed.service",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-machine-id-commit.service",
    "systemd-journal-flush.service",
    "systemd-journal-catalog-update.service",
    "systemd-hwdb-update.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-sysusers.service",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-initctl.socket",
    "modprobe@dm_mod.service",
    "modprobe@loop.service",
    "ldconfig.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
];

/// Small files of the root.
const FILES: &[(&str, &str)] = &[
    ("etc/passwd", include_str!("systemd/passwd")),
    ("etc/group", include_str!("systemd/group")),
    ("etc/systemd/system/lab.target", include_str!("systemd/lab.target")),
    ("etc/systemd/system/lab-agent.service", include_str!("systemd/lab-agent.service")),
    ("etc/nsswitch.conf", "passwd: files systemd\ngroup: files [SUCCESS=merge] systemd\nshadow: files\n"),
    // A machine without an identity would be at its first boot and enable every unit.
    ("etc/machine-id", "6c61620000000000000000000000006c\n"),
    ("etc/hostname", "lab\n"),
    ("etc/modules-load.d/kvm.conf", "kvm-amd\ntun\n"),
    // Nothing here does udev's work, and the nodes come with the modules.
    (
        "etc/systemd/system/systemd-modules-load.service.d/kvm.conf",
        "[Service]\nExecStartPost=/bin/sh -c 'chgrp kvm /dev/kvm; chmod 660 /dev/kvm; chmod 666 /dev/net/tun'\n",
    ),
    ("etc/tmpfiles.d/systemd-network.conf", ""),
    // Stands for a host with enough memory: guests touch little of theirs.
    ("etc/sysctl.d/lab.conf", "vm.overcommit_memory = 1\n"),
    ("etc/systemd/journald.conf.d/lab.conf", "[Journal]\nStorage=volatile\nRateLimitBurst=0\n"),
];

/// Writes the disk to `dir` and returns its path.
///
/// # Errors
/// A tool, a package or a program is missing.
pub fn disk(kernel: &Kernel, content: &Content, dir: &Path) -> Result<PathBuf> {
    let tarball = packages(dir)?;
    let root = fs::canonicalize(dir)?.join(format!("l1-root-{}", std::process::id()));
    let disk = root.with_extension("img");
    let made = fill(&tarball, kernel, content, &root).and_then(|()| pack(&root, &disk));
    let removed = fs::remove_dir_all(&root);
    made?;
    removed.map_err(|error| Failure::new(format!("{}: {error}", root.display())))?;
    Ok(disk)
}

/// The tarball with the unpacked packages; made when it is not there yet.
fn packages(dir: &Path) -> Result<PathBuf> {
    // A change of the recipe makes another name.
    let recipe = format!("{SUITE} {PACKAGES} {EXCLUDED:?}");
    let sum = recipe
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let tarball = dir.join(format!("packages-{sum:016x}.tar"));
    if tarball.exists() {
        return Ok(tarball);
    }
    println!("lab: fetching Debian's packages for the L1 with systemd");
    let partial = dir.join(format!("packages-{}.partial", std::process::id()));
    let mut command = Command::new("timeout");
    command.args([FETCH, "mmdebstrap", "--mode=chrootless", "--variant=extract", "--format=tar"]);
    // Nothing of these packages runs here: what the mode warns of, as root, cannot happen.
    command.args(["--skip=check/chrootless", "--quiet", "--aptopt=Acquire::Retries \"3\""]);
    command.args(EXCLUDED.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--include={PACKAGES}")).arg(SUITE).arg(&partial);
    command.args(std::env::var_os(MIRROR));
    let fetched = run(&mut command).and_then(|()| Ok(fs::rename(&partial, &tarball)?));
    if let Err(failure) = fetched {
        // It may not be there.
        let _ = fs::remove_file(&partial);
        return Err(failure
            .context(format!("no Debian packages for the L1 with systemd ({MIRROR} names another mirror)")));
    }
    Ok(tarball)
}

/// Lays out the root directory.
fn fill(tarball: &Path, kernel: &Kernel, content: &Content, root: &Path) -> Result<()> {
    // bookworm's packages still have files in /bin and /lib, which are links on every installed system.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(dir))?;
        symlink(format!("usr/{dir}"), root.join(dir))?;
    }
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"]).arg(root).arg("-f").arg(tarball);
    run(&mut tar)?;
    for (path, text) in FILES {
        write(&root.join(path), text.as_bytes(), false)?;
    }
    boot_to_the_agent(root)?;
    if !kernel.modules(&BUILT_IN)?.is_empty() {
        return Err(Failure::new(format!("{} has {BUILT_IN:?} as modules", kernel.image.display())));
    }
    for path in kernel.files(&[&L1_MODULES[..], &L1_DEVICES].concat())? {
        let inside = path.strip_prefix("/lib").map_err(|_| "modules outside /lib")?;
        write(&root.join("usr/lib").join(inside), &read(&path)?, false)?;
    }
    write(&root.join(paths::KERNEL.trim_start_matches('/')), &read(&kernel.image)?, false)?;
    write(&root.join(paths::INITRD.trim_start_matches('/')), &guest_initrd(kernel)?, false)?;
    write(&root.join("usr/bin/bulkhead-lab"), &read(&std::env::current_exe()?)?, true)?;
    // Makes a TAP interface.
    write(&root.join("usr/bin/busybox"), &Busybox::find()?.content, true)?;
    for path in &content.back_ends {
        let name = path.file_name().ok_or("a back end without a name")?;
        write(&root.join("usr/bin").join(name), &read(path)?, true)?;
    }
    let mut install = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../jail-profiles/install.sh"));
    run(install.env("DESTDIR", root).env("CARGO_TARGET_DIR", fs::canonicalize(target_dir())?))?;
    content.overlay.as_ref().map_or(Ok(()), |overlay| {
        run(Command::new("cp").args(["-a", "--no-preserve=ownership"]).arg(overlay.join(".")).arg(root))
    })
}

/// Makes the agent's target what is booted, with as little else as systemd can do without.
fn boot_to_the_agent(root: &Path) -> Result<()> {
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        symlink("/dev/null", units.join(unit))?;
    }
    symlink("lab.target", units.join("default.target"))?;
    fs::create_dir(units.join("lab.target.wants"))?;
    symlink("../lab-agent.service", units.join("lab.target.wants/lab-agent.service"))?;
    // They look for devices, mounts and consoles.
    let masked = root.join("etc/systemd/system-generators");
    fs::create_dir_all(&masked)?;
    for entry in fs::read_dir(root.join("usr/lib/systemd/system-generators"))? {
        symlink("/dev/null", masked.join(entry?.file_name()))?;
    }
    Ok(())
}

/// Writes a file, readable by all, with the directories above it.
fn write(path: &Path, bytes: &[u8], executable: bool) -> Result<()> {
    let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, bytes));
    let mode = Permissions::from_mode(if executable { 0o755 } else { 0o644 });
    written
        .and_then(|()| fs::set_permissions(path, mode))
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

/// Makes a file system of the directory.
fn pack(root: &Path, disk: &Path) -> Result<()> {
    // For an ordinary user: a namespace in which what is his looks like root's.
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new("mke2fs")
    } else {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "mke2fs"]);
        command
    };
    // Debian has it where only root looks.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.args(["-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-b", "4096", "-d"]);
    run(command.arg(root).arg(disk).arg(DISK))
}

/// Runs a tool that must succeed.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| Failure::new(format!("{name}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    // The first complaint says most.
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let reason = text.lines().find(|line| line.starts_with("E:")).or_else(|| text.lines().last());
    Err(Failure::new(format!("{name}: {} ({})", reason.unwrap_or("it says nothing"), output.status)))
}
