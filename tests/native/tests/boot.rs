//! The guest boots: console, vCPUs, memory, and the options that bend the start.

use std::fs;
use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use bulkhead_framework::{Result, Transcript};
use bulkhead_native_tests::{Guest, SOON, Setup, eventually};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

#[test]
fn the_embedded_guest_says_hello() -> Result<()> {
    let guest = Guest::boot("test=hello", &[])?;
    guest.expect("Bulkhead native guest: test=hello")?;
    guest.expect("done: hello")?;
    guest.quit()
}

#[test]
fn without_a_kernel_a_shell_runs() -> Result<()> {
    let mut guest = Guest::boot("", &["-m", "64M", "-smp", "3"])?;
    guest.expect("no -kernel was given")?;
    guest.expect("64 MiB of RAM, 3 vCPU(s)")?;
    guest.vm().type_in("poweroff\r")?;
    guest.expect("powering off")?;
    guest.ends(0)
}

#[test]
fn stdio_echoes_both_ways() -> Result<()> {
    let mut guest = Guest::boot("test=echo", &[])?;
    guest.expect("ready")?;
    // More than one FIFO and one page.
    let text: String = (0..500).map(|n| format!("{n:04x} echo ")).collect();
    guest.vm().type_in(&text)?;
    // Each byte costs several exits, and those cost milliseconds on a loaded host in the lab.
    guest.vm().console().expect(&text, SOON * 3)?;
    guest.quit()
}

#[test]
fn the_end_of_standard_input_does_not_end_the_vm() -> Result<()> {
    let mut guest = Guest::boot("test=counter ms=1", &[])?;
    guest.vm().child().close_stdin();
    guest.expect("count 50")?;
    guest.quit()
}

#[test]
fn a_socket_echoes_and_takes_client_after_client() -> Result<()> {
    let setup = Setup::new("test=echo", &["-serial", "unix:s.sock,server=on,wait=on"]);
    let guest = setup.with(|vm| vm.without_serial()).start()?;
    let path = guest.trace().dir().join("s.sock");
    for round in 0..3 {
        let mut stream = eventually("a serial socket", SOON, || {
            UnixStream::connect(&path).map_err(|error| error.to_string())
        })?;
        let console = Transcript::of("serial socket", stream.try_clone()?);
        if round == 0 {
            console.expect("ready", SOON)?;
        }
        let text = format!("round {round} {}", "x".repeat(1500));
        stream.write_all(text.as_bytes())?;
        console.expect(&text, SOON).map_err(|failure| guest.explain(failure))?;
        stream.shutdown(Shutdown::Both)?;
    }
    guest.quit()
}

#[test]
fn a_file_has_all_that_the_guest_wrote() -> Result<()> {
    let setup = Setup::new("test=poweroff", &["-serial", "file:serial.log"]).leaves("serial.log");
    let guest = setup.with(|vm| vm.without_serial()).start()?;
    guest.ends(0)?;
    let log = fs::read_to_string(guest.trace().dir().join("serial.log"))?;
    guest.check(log.ends_with("powering off\r\n"), &format!("the file has {log:?}"))
}

#[test]
fn a_flood_into_a_file_is_whole() -> Result<()> {
    let chardev = ["-chardev", "file,id=c,path=serial.log", "-serial", "chardev:c"];
    let setup = Setup::new("test=flood n=400", &chardev).leaves("serial.log");
    let guest = setup.with(|vm| vm.without_serial()).start()?;
    let path = guest.trace().dir().join("serial.log");
    let log = eventually("the end of the flood", SOON, || {
        let log = fs::read_to_string(&path).map_err(|error| error.to_string())?;
        if log.contains("done: flood") { Ok(log) } else { Err(format!("{} bytes", log.len())) }
    })?;
    let lines = log.lines().filter(|line| line.starts_with("0123456789abc") && line.len() == 62).count();
    guest.check(lines == 400, &format!("{lines} whole lines of 400"))?;
    guest.quit()
}

#[test]
fn null_takes_everything() -> Result<()> {
    let guest = Setup::new("test=poweroff", &["-serial", "null"]).with(|vm| vm.without_serial()).start()?;
    guest.ends(0)
}

/// Reads the lines of `test=smp`: fields by name.
fn cpus(guest: &Guest, count: usize) -> Result<Vec<Vec<u64>>> {
    let mut cpus = Vec::new();
    for _ in 0..count {
        let line = guest.line("cpu apic=")?;
        let line = format!("apic={line}");
        let fields = line.split(' ').filter_map(|field| field.split_once('=')?.1.parse().ok());
        cpus.push(fields.collect());
    }
    guest.expect(&format!("cpus: {count} of {count}\r\n"))?;
    Ok(cpus)
}

/// The bits that `count` ids need.
fn bits(count: u64) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Boots so many sockets of cores of threads and compares guest, QMP and host.
fn topology(sockets: u64, cores: u64, threads: u64) -> Result<()> {
    let places =
        (0..sockets).flat_map(|s| (0..cores).flat_map(move |c| (0..threads).map(move |t| (s, c, t))));
    let places: Vec<_> = places.collect();
    let count = places.len();
    let smp = format!("{count},sockets={sockets},cores={cores},threads={threads}");
    let guest = Guest::boot("test=smp", &["-smp", &smp])?;
    let (thread_shift, package_shift) = (bits(threads), bits(cores) + bits(threads));
    let mut seen: Vec<u64> = Vec::new();
    for cpu in cpus(&guest, count)? {
        let [apic, initial, x2apic, logical, shift, per_core, above, per_package] = cpu[..] else {
            return Err(format!("a line with other fields: {cpu:?}").into());
        };
        guest.check(apic == initial && apic == x2apic, &format!("its ids differ: {cpu:?}"))?;
        guest.check(
            logical == (cores * threads).next_power_of_two() || logical == cores * threads,
            &format!("logical: {cpu:?}"),
        )?;
        let shifts = (shift, above) == (thread_shift.into(), package_shift.into());
        guest.check(
            shifts && (per_core, per_package) == (threads, cores * threads),
            &format!("levels: {cpu:?}"),
        )?;
        seen.push(apic);
    }
    seen.sort_unstable();
    let places =
        (0..sockets).flat_map(|s| (0..cores).flat_map(move |c| (0..threads).map(move |t| (s, c, t))));
    let places: Vec<_> = places.collect();
    let expected: Vec<u64> =
        places.iter().map(|(s, c, t)| s << package_shift | c << thread_shift | t).collect();
    guest.check(seen == expected, &format!("APIC ids {seen:?}, not {expected:?}"))?;
    let core = guest.process("core")?;
    let reply = guest.qmp()?.execute("query-cpus-fast", json!({}))?;
    let listed = reply.as_array().map(Vec::as_slice).unwrap_or_default();
    guest.check(listed.len() == count, &format!("query-cpus-fast: {reply}"))?;
    for (index, (cpu, (socket, core_id, thread))) in listed.iter().zip(places).enumerate() {
        guest.check(cpu["cpu-index"] == json!(index), &format!("index {index}: {cpu}"))?;
        let props = json!({"socket-id": socket, "core-id": core_id, "thread-id": thread});
        let same = |key: &str| cpu["props"].get(key) == props.get(key);
        guest.check(
            ["socket-id", "core-id", "thread-id"].into_iter().all(same),
            &format!("{cpu}, not {props}"),
        )?;
        let tid = cpu["thread-id"].as_u64().unwrap_or(0);
        let comm = fs::read_to_string(format!("/proc/{}/task/{tid}/comm", core.pid)).unwrap_or_default();
        guest.check(comm.trim() == format!("vcpu{index}"), &format!("thread {tid} of core is {comm:?}"))?;
    }
    guest.quit()
}

#[test]
fn one_cpu() -> Result<()> {
    topology(1, 1, 1)
}

#[test]
fn two_sockets() -> Result<()> {
    topology(2, 1, 1)
}

#[test]
fn four_cpus_in_threads() -> Result<()> {
    topology(1, 2, 2)
}

#[test]
fn sixteen_cpus_with_three_levels() -> Result<()> {
    topology(2, 4, 2)
}

#[test]
fn odd_counts_leave_gaps_in_the_ids() -> Result<()> {
    topology(2, 3, 1)
}

#[test]
fn sixty_four_cpus() -> Result<()> {
    topology(4, 8, 2)
}

/// Boots with so much RAM; the map's RAM must be this much, above 4 GiB as expected, and hold what is written.
fn memory(size: &str, bytes: u64, above: u64) -> Result<()> {
    let guest = Guest::boot("test=mem", &["-m", size])?;
    let total = guest.line("ram ")?;
    let text = guest.console().text();
    let map = text.lines().filter_map(|line| line.strip_prefix("memory "));
    let ram: Vec<(u64, u64)> = map
        .filter_map(|line| {
            let (range, kind) = line.trim().split_once(" type ")?;
            let (start, size) = range.split_once(' ')?;
            let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
            (kind == "1").then_some((hex(start)?, hex(size)?))
        })
        .collect();
    let high: u64 = ram.iter().filter(|(start, _)| *start >= 4 * GIB).map(|(_, size)| size).sum();
    guest.check(high == above, &format!("{high:#x} bytes above 4 GiB, not {above:#x}"))?;
    let low = ram.iter().filter(|(start, _)| *start < 4 * GIB).map(|(start, size)| start + size).max();
    guest.check(low == Some(bytes - above), &format!("low RAM ends at {low:x?}"))?;
    let sum: u64 = ram.iter().map(|(_, size)| size).sum();
    // The first MiB has a hole for what PCs have there.
    guest.check(sum <= bytes && sum + (1 << 20) > bytes, &format!("{sum:#x} bytes in the map, {total}"))?;
    let touched: Vec<&str> = text.lines().filter(|line| line.starts_with("touched ")).collect();
    let held = touched.iter().all(|line| line.trim_end().ends_with("true"));
    guest.check(held && touched.len() > usize::from(above > 0), &format!("{touched:?}"))?;
    guest.quit()
}

#[test]
fn memory_below_the_hole() -> Result<()> {
    memory("64M", 64 << 20, 0)
}

#[test]
fn memory_up_to_the_hole() -> Result<()> {
    memory("3G", 3 * GIB, 0)
}

#[test]
fn memory_around_the_hole() -> Result<()> {
    memory("4G", 4 * GIB, GIB)
}

#[test]
fn more_memory_above_the_hole() -> Result<()> {
    memory("6G", 6 * GIB, 3 * GIB)
}

#[test]
fn a_held_start_waits_for_cont() -> Result<()> {
    let guest = Guest::boot("test=poweroff", &["-S"])?;
    let mut qmp = guest.qmp()?;
    let status = qmp.execute("query-status", json!({}))?;
    guest.check(status["status"] == "prelaunch" && status["running"] == false, &status.to_string())?;
    guest.check(guest.console().text().is_empty(), "the guest runs before cont")?;
    qmp.execute("cont", json!({}))?;
    guest.event(&mut qmp, "RESUME", &Value::Null)?;
    guest.expect("powering off")?;
    guest.ends(0)
}

#[test]
fn no_reboot_ends_instead() -> Result<()> {
    let guest = Guest::boot("test=reset", &["-no-reboot", "-S"])?;
    let mut qmp = guest.qmp()?;
    qmp.execute("cont", json!({}))?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": true, "reason": "guest-reset"}))?;
    guest.ends(0)?;
    guest.check(guest.console().text().matches("native guest").count() == 1, "it booted again")
}

#[test]
fn no_shutdown_stays() -> Result<()> {
    let guest = Guest::boot("test=poweroff", &["-no-shutdown", "-S"])?;
    let mut qmp = guest.qmp()?;
    qmp.execute("cont", json!({}))?;
    guest.event(&mut qmp, "SHUTDOWN", &json!({"guest": true, "reason": "guest-shutdown"}))?;
    guest.event(&mut qmp, "STOP", &Value::Null)?;
    guest.check(qmp.status()? == "shutdown", "not in run state shutdown")?;
    let refused = qmp.try_execute("cont", json!({}))?.expect_err("cont out of shutdown");
    guest.check(refused.desc == "Resetting the Virtual Machine is required", &refused.to_string())?;
    qmp.execute("quit", json!({}))?;
    guest.ends(0)
}

#[test]
fn a_pid_file_holds_the_launchers_id() -> Result<()> {
    let mut guest = Guest::boot("test=hello", &["-pidfile", "pid"])?;
    guest.expect("done: hello")?;
    let pid = fs::read_to_string(guest.trace().dir().join("pid"))?;
    let own = guest.vm().pid();
    guest.check(pid.trim() == own.to_string(), &format!("{pid:?}, not {own}"))?;
    guest.quit()
}

#[test]
fn ten_starts_in_a_row() -> Result<()> {
    for _ in 0..10 {
        let guest = Guest::boot("test=poweroff", &["-m", "64M"])?;
        guest.expect("powering off")?;
        guest.ends(0)?;
    }
    Ok(())
}

/// FNV-1a, 32 bits, as the guest computes it.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[test]
fn the_users_acpi_tables_are_in_memory_after_each_boot() -> Result<()> {
    let (first, second) = (vec![0x5a; 40_000], b"second".to_vec());
    let whole = [&b"OWN1\0\0\0\0\x07\0MYSELFMYTABLE \x09\0\0\0MINE\x08\0\0\0"[..], &[1, 2, 3]].concat();
    let made = "sig=TEST,rev=3,oem_id=ME,oem_rev=0x11,asl_compiler_id=ASL,asl_compiler_rev=2,data=a:b";
    let args = ["-acpitable", made, "-acpitable", "oem_table_id=OTHER,file=whole", "-m", "16M"];
    let setup = Setup::new("test=tables", &args).leaves("a").leaves("b").leaves("whole");
    let guest = setup.start_in(|dir| {
        fs::write(dir.join("a"), &first)?;
        fs::write(dir.join("b"), &second)?;
        Ok(fs::write(dir.join("whole"), &whole)?)
    })?;
    let body = [first, second].concat();
    let lines = [
        format!(
            "table TEST len=40042 rev=3 oem=ME\\x00\\x00\\x00\\x00,QEMUQEMU,17 compiler=ASL\\x00,2 body={:x}\r\n",
            hash(&body)
        ),
        format!(
            "table OWN1 len=39 rev=7 oem=MYSELF,OTHER\\x00\\x00\\x00,9 compiler=MINE,8 body={:x}\r\n",
            hash(&[1, 2, 3])
        ),
    ];
    let mut qmp = guest.qmp()?;
    for boots in 1..=3 {
        guest.expect("end of the tables")?;
        let text = guest.console().text();
        guest.check(!text.contains("wrong checksum"), "a checksum is wrong")?;
        for line in &lines {
            guest.check(text.matches(line.as_str()).count() == boots, &format!("boot {boots}: {line:?}"))?;
        }
        let tables = text.lines().filter(|line| line.starts_with("table ")).count();
        guest.check(tables == 5 * boots, &format!("boot {boots}: {tables} tables"))?;
        if boots < 3 {
            qmp.execute("system_reset", json!({}))?;
        }
    }
    guest.quit()
}

#[test]
fn the_guest_finds_its_uuid_and_memory_in_smbios() -> Result<()> {
    let uuid = "8d8b4d8e-5ac4-4ee1-8d3c-a4a9f0c4b9f2";
    let guest = Guest::boot("test=tables", &["-uuid", uuid, "-m", "4G", "-smp", "3,maxcpus=4,cores=2"])?;
    guest.expect("end of the tables")?;
    let text = guest.console().text();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("smbios ")).collect();
    let system = format!("smbios 1 uuid={uuid}");
    let expected = [
        "smbios 0",
        &system,
        "smbios 3",
        "smbios 4",
        "smbios 4",
        "smbios 16 bytes=4294967296",
        "smbios 17",
        "smbios 19 from=0x0 to=0xbfffffff",
        "smbios 19 from=0x100000000 to=0x13fffffff",
        "smbios 32",
        "smbios 127",
    ];
    guest.check(lines == expected, &format!("{lines:#?}"))?;
    guest.quit()
}
