//! Starts that cannot succeed: one line with the cause, exit status 1, nothing left, and soon.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_framework::{Result, Scratch};
use bulkhead_native_tests::{Guest, Setup, Step, install, slowness};
use nix::sys::resource::Resource;
use nix::sys::stat::Mode;

/// A refusal takes no longer, on a loaded host.
const PROMPT: Duration = Duration::from_secs(5);
const BINARIES: [&str; 5] =
    ["bulkhead-core", "bulkhead-console", "bulkhead-broker", "bulkhead-loader", "bulkhead-dump"];
/// A user who is in no group that matters.
const NOBODY: Step = Step::User(4242, 4242, None);

/// A start in which something exists already that must go again if something else fails.
fn setup(args: &[&str]) -> Setup {
    Setup::new("test=hello", args).with(|vm| vm.args(["-pidfile", "pid"]))
}

/// The start must fail with one line that has all of `words`.
fn refused(guest: &Guest, begin: Instant, words: &[&str]) -> Result<()> {
    guest.ends(1)?;
    let took = begin.elapsed();
    guest.check(took < PROMPT * slowness(), &format!("it took {took:?}"))?;
    guest.said(words)
}

fn refuses(setup: Setup, words: &[&str]) -> Result<()> {
    let begin = Instant::now();
    refused(&setup.start()?, begin, words)
}

/// As an ordinary user, with the binaries where every user can run them.
fn refuses_user(setup: Setup, steps: &[Step], words: &[&str]) -> Result<()> {
    let scratch = Scratch::new()?;
    let launcher = install(scratch.path(), &BINARIES)?;
    refuses(setup.with(|vm| vm.launcher(launcher)).steps(steps), words)
}

#[test]
fn without_kvm() -> Result<()> {
    refuses(setup(&[]).steps(&[Step::NoKvm]), &["/dev/kvm: No such file or directory", "modprobe"])
}

#[test]
fn without_permission_for_kvm() -> Result<()> {
    let words = ["/dev/kvm: Permission denied", "group kvm", "usermod"];
    refuses_user(setup(&[]), &[Step::KvmOf(77), NOBODY], &words)
}

#[test]
fn with_something_else_at_dev_kvm() -> Result<()> {
    refuses(setup(&[]).steps(&[Step::WrongKvm]), &["KVM"])
}

#[test]
fn with_little_address_space() -> Result<()> {
    let limit = Step::Limit(Resource::RLIMIT_AS, 256 << 20);
    refuses(setup(&["-m", "1G"]).steps(&[limit]), &["memory"])
}

#[test]
fn with_small_files_only() -> Result<()> {
    // Too small for what compartments leave to their successors, and for the guest's memory only.
    for (limit, words) in
        [(1 << 20, ["RLIMIT_FSIZE", "ulimit"]), (64 << 20, ["RLIMIT_FSIZE", "bulkhead-core"])]
    {
        let limit = Step::Limit(Resource::RLIMIT_FSIZE, limit);
        let steps = [limit, Step::KvmOf(77), Step::User(4242, 4242, Some(77))];
        refuses_user(setup(&["-m", "1G"]), &steps, &words)?;
    }
    Ok(())
}

#[test]
fn with_few_descriptors() -> Result<()> {
    refuses(setup(&[]).steps(&[Step::Limit(Resource::RLIMIT_NOFILE, 64)]), &["open files", "ulimit"])
}

#[test]
fn without_user_namespaces() -> Result<()> {
    refuses(setup(&[]).steps(&[Step::NoUserNamespaces]), &["bulkhead-core", "user.max_user_namespaces"])
}

#[test]
fn with_a_socket_that_is_in_use() -> Result<()> {
    for option in ["-qmp", "-serial"] {
        let mut held = None;
        let setup = setup(&[option, "unix:used,server=on,wait=off"]).leaves("used");
        let setup = setup.with(|vm| if option == "-serial" { vm.without_serial() } else { vm });
        let begin = Instant::now();
        let guest = setup.start_in(|dir| {
            held = Some(UnixListener::bind(dir.join("used"))?);
            Ok(())
        })?;
        refused(&guest, begin, &[option, "Address already in use"])?;
        assert!(guest.trace().dir().join("used").exists(), "the other's socket is gone");
    }
    Ok(())
}

#[test]
fn with_a_file_in_the_sockets_place() -> Result<()> {
    let begin = Instant::now();
    let setup = setup(&["-qmp", "unix:file,server=on,wait=off"]).leaves("file");
    let guest = setup.start_in(|dir| Ok(fs::write(dir.join("file"), "precious")?))?;
    refused(&guest, begin, &["-qmp", "file", "not a socket"])?;
    assert_eq!(fs::read_to_string(guest.trace().dir().join("file"))?, "precious");
    Ok(())
}

#[test]
fn with_a_socket_in_a_directory_that_is_missing() -> Result<()> {
    refuses(setup(&["-qmp", "unix:no/q,server=on,wait=off"]), &["-qmp", "no/q", "No such file or directory"])
}

#[test]
fn with_a_pid_file_that_is_held() -> Result<()> {
    let first = setup(&[]).start()?;
    first.running()?;
    let path = first.trace().dir().join("pid").to_string_lossy().into_owned();
    refuses(Setup::new("test=hello", &["-pidfile", &path]), &["pid file", "another process holds it"])?;
    first.quit()
}

#[test]
fn with_nobody_to_connect_to() -> Result<()> {
    let chardev = ["-chardev", "socket,id=m,path=peer", "-mon", "chardev=m,mode=control"];
    refuses(setup(&chardev), &["-chardev", "peer", "No such file or directory"])
}

/// `-kernel kernel` after `make` has made it, or not.
fn kernel(make: impl FnOnce(&Path) -> Result<()>, words: &[&str]) -> Result<()> {
    let begin = Instant::now();
    let setup = setup(&["-kernel", "kernel"]).leaves("kernel");
    let guest = setup.start_in(|dir| make(&dir.join("kernel")))?;
    refused(&guest, begin, words)
}

fn kernel_of(bytes: &[u8], words: &[&str]) -> Result<()> {
    kernel(|path| Ok(fs::write(path, bytes)?), words)
}

#[test]
fn with_a_kernel_that_is_no_file() -> Result<()> {
    kernel(|_| Ok(()), &["-kernel kernel", "No such file or directory"])?;
    kernel(|path| Ok(fs::create_dir(path)?), &["-kernel kernel", "not a regular file"])?;
    kernel(|path| Ok(symlink("nowhere", path)?), &["-kernel kernel", "No such file or directory"])?;
    let fifo = |path: &Path| Ok(nix::unistd::mkfifo(path, Mode::S_IRWXU).map_err(|error| error.to_string())?);
    kernel(fifo, &["-kernel kernel", "not a regular file"])
}

#[test]
fn with_a_kernel_that_may_not_be_read() -> Result<()> {
    let secret = Scratch::new()?;
    let path = secret.path().join("kernel");
    fs::write(&path, "secret")?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let path = path.to_string_lossy().into_owned();
    let steps = [Step::KvmOf(77), Step::User(4242, 4242, Some(77))];
    refuses_user(setup(&["-kernel", &path]), &steps, &["-kernel", "Permission denied"])
}

#[test]
fn with_a_kernel_that_is_empty_or_garbage() -> Result<()> {
    kernel_of(b"", &["loader", "kernel"])?;
    kernel_of(b"#!/bin/sh\n", &["loader", "kernel"])?;
    kernel_of(&[0xa5; 100_000], &["loader", "kernel"])
}

#[test]
fn with_an_elf_file_that_is_no_kernel() -> Result<()> {
    let own = fs::read("/proc/self/exe")?;
    kernel_of(&own, &["loader", "kernel", "PVH"])?;
    kernel_of(own.get(..1000).unwrap_or_default(), &["loader", "kernel"])?;
    kernel_of(own.get(..20).unwrap_or_default(), &["loader", "kernel"])
}

#[test]
fn with_a_kernel_larger_than_memory() -> Result<()> {
    let begin = Instant::now();
    let setup = setup(&["-kernel", "kernel", "-m", "64M"]).leaves("kernel");
    let large = |dir: &Path| Ok(fs::File::create(dir.join("kernel"))?.set_len(100 << 20)?);
    refused(&setup.start_in(large)?, begin, &["loader", "kernel"])
}

#[test]
fn with_an_initrd_that_is_missing() -> Result<()> {
    let args = ["-kernel", "/proc/self/exe", "-initrd", "missing"];
    refuses(setup(&args), &["-initrd missing", "No such file or directory"])
}

#[test]
fn with_a_binary_missing() -> Result<()> {
    for missing in BINARIES {
        let scratch = Scratch::new()?;
        let rest: Vec<&str> = BINARIES.into_iter().filter(|binary| *binary != missing).collect();
        let launcher = install(scratch.path(), &rest)?;
        refuses(setup(&[]).with(|vm| vm.launcher(launcher)), &[missing])?;
    }
    Ok(())
}

#[test]
fn with_a_binary_that_cannot_run() -> Result<()> {
    let scratch = Scratch::new()?;
    let launcher = install(scratch.path(), &BINARIES)?;
    fs::write(scratch.path().join("bin/bulkhead-broker"), "not a program")?;
    refuses(setup(&[]).with(|vm| vm.launcher(launcher)), &["cannot start bulkhead-broker: exec"])
}

#[test]
fn with_options_that_make_no_sense() -> Result<()> {
    refuses(setup(&["-m", "1x"]), &["-m 1x"])?;
    refuses(setup(&["-smp", "65"]), &["-smp 65"])?;
    refuses(setup(&["-smp", "4,sockets=3"]), &["-smp"])?;
    refuses(setup(&["-machine", "q35"]), &["-machine q35"])?;
    refuses(setup(&["-mon", "chardev=none,mode=control"]), &["none", "not found"])?;
    refuses(setup(&["-frobnicate"]), &["-frobnicate"])
}

#[test]
fn with_acpi_tables_that_are_none() -> Result<()> {
    let with = |option: &str, content: usize| {
        let setup = setup(&["-acpitable", option]).leaves("table");
        setup.start_in(move |dir| Ok(fs::write(dir.join("table"), vec![0; content])?))
    };
    for (option, content, words) in [
        ("data=nope", 0, "-acpitable data=nope: can't open file nope: No such file or directory"),
        ("data=table:/", 0, "-acpitable data=table:/: can't read file /: not a regular file"),
        (
            "file=table",
            35,
            "-acpitable file=table: ACPI table claiming to have header is too short, available: 35, expected: 36",
        ),
        (
            "sig=A,data=table",
            65_500,
            "-acpitable sig=A,data=table: ACPI table too big, requested: 65536, max: 65535",
        ),
    ] {
        let begin = Instant::now();
        refused(&with(option, content)?, begin, &[words])?;
    }
    Ok(())
}
