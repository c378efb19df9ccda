//! Machine files: TOML with the options of the command line, limits of the slice, and who may connect.

use bulkhead_control_api::config::Role;
use toml::{Table, Value};

use crate::cli::{self, Command};
use crate::options::{At, Backend, Chardev, Monitor, Options, Place, Target};

/// The longest machine file, in bytes.
pub const MAX_FILE: usize = 1 << 20;
/// Limits of the VM's slice that a machine file may set (`systemd.resource-control(5)`).
///
/// Each with its value where there is none.
const LIMITS: [(&str, &str); 6] = [
    ("MemoryMax", "infinity"),
    ("MemorySwapMax", "infinity"),
    ("TasksMax", "infinity"),
    ("CPUWeight", ""),
    ("CPUQuota", ""),
    ("IOWeight", ""),
];
/// The sockets that a VM's socket units make, and the role of each.
const MONITORS: [(&str, Role); 3] =
    [("operator", Role::Operator), ("monitor", Role::Monitor), ("console", Role::Console)];
/// Character device of the serial port's socket unit.
const SERIAL: &str = "serial";

/// A machine as its file describes it.
#[derive(Debug)]
pub struct Machine {
    /// As from the command line.
    pub options: Options,
    /// `KEY=VALUE` for the VM's slice.
    pub limits: Vec<String>,
}

/// Whether units can carry this name: it is part of user names (31 bytes), slices (where `-` nests) and paths.
pub fn check_name(name: &str) -> Result<(), String> {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_lowercase());
    let others = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if first && others && name.len() <= 16 {
        return Ok(());
    }
    Err(format!("{name:?} is no name for a VM: use a lower-case letter and up to 15 of a-z, 0-9 and _"))
}

/// Reads the machine file of the VM `name`.
///
/// # Errors
/// One line that names what is wrong.
pub fn parse(name: &str, text: &str) -> Result<Machine, String> {
    check_name(name)?;
    if text.len() > MAX_FILE {
        return Err(format!("a machine file has at most {MAX_FILE} bytes"));
    }
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| one_line(&e.to_string()))?;
    let limits = limits(table.remove("limits"))?;
    let access = table.remove("access");
    let mut args = vec!["run".to_owned()];
    for (key, value) in &table {
        option(&mut args, key, value)?;
    }
    let Command::Run(given) = cli::parse(&args).map_err(|e| e.to_string())? else {
        return Err("help and version are no options of a machine".to_owned());
    };
    let mut options = Options::new(&given).map_err(|e| e.to_string())?;
    options.name.get_or_insert_with(|| name.to_owned());
    if options.pidfile.is_some() || options.nographic {
        return Err(
            "-pidfile and -nographic are for bulkhead run: a unit has neither file nor terminal".to_owned()
        );
    }
    add_sockets(name, &mut options, access)?;
    Ok(Machine { options, limits })
}

/// The first lines of the TOML parser's message say where and what, in several lines.
fn one_line(message: &str) -> String {
    let words: Vec<&str> = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    words.join(": ")
}

/// All limits: what the file does not name is as it is without a file, whatever a former file said.
fn limits(value: Option<Value>) -> Result<Vec<String>, String> {
    let mut table = match value {
        None => Table::new(),
        Some(Value::Table(table)) => table,
        Some(_) => return Err("limits: expects a table".to_owned()),
    };
    let mut all = Vec::new();
    for (key, default) in LIMITS {
        let text = match table.remove(key) {
            None => default.to_owned(),
            Some(value) => scalar(&value)
                .filter(|text| !text.is_empty() && !text.contains(char::is_whitespace))
                .ok_or_else(|| format!("limits: {key} expects one word or number"))?,
        };
        all.push(format!("{key}={text}"));
    }
    match table.keys().next() {
        None => Ok(all),
        Some(other) => {
            let known = LIMITS.map(|(key, _)| key).join(", ");
            Err(format!("limits: unknown limit {other:?}: there are {known}"))
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

/// One option as words of the command line. An array is the option several times.
fn option(args: &mut Vec<String>, key: &str, value: &Value) -> Result<(), String> {
    let name = format!("-{key}");
    match value {
        Value::Boolean(true) => args.push(name),
        Value::Boolean(false) => {}
        Value::Array(values) => {
            for value in values {
                if matches!(value, Value::Array(_) | Value::Boolean(_)) {
                    return Err(format!("{key}: expects texts or tables"));
                }
                option(args, key, value)?;
            }
        }
        Value::Table(table) => {
            let parameters: Result<Vec<String>, String> =
                table.iter().map(|(parameter, value)| parameters(key, parameter, value)).collect();
            args.extend([name, parameters?.join(",")]);
        }
        other => {
            let text =
                scalar(other).ok_or_else(|| format!("{key}: expects a text, a number, true or false"))?;
            args.extend([name, text]);
        }
    }
    Ok(())
}

/// `parameter=value`, several times for an array.
fn parameters(key: &str, parameter: &str, value: &Value) -> Result<String, String> {
    let one = |value: &Value| {
        let text = match value {
            Value::Boolean(on) => Some(if *on { "on" } else { "off" }.to_owned()),
            other => scalar(other),
        };
        let text =
            text.ok_or_else(|| format!("{key}: {parameter}: expects a text, a number, true or false"))?;
        Ok(format!("{parameter}={}", text.replace(',', ",,")))
    };
    match value {
        Value::Array(values) => {
            Ok(values.iter().map(one).collect::<Result<Vec<String>, String>>()?.join(","))
        }
        other => one(other),
    }
}

/// Adds what the socket units listen on: three monitors, and the serial port unless the file says otherwise.
fn add_sockets(name: &str, options: &mut Options, access: Option<Value>) -> Result<(), String> {
    let mut access = match access {
        None => Table::new(),
        Some(Value::Table(table)) => table,
        Some(_) => return Err("access: expects a table".to_owned()),
    };
    let socket = |id: &str| {
        let place = Place::Unit(format!("/run/bulkhead/{name}/{id}"));
        let backend = Backend::Socket { place, server: true, wait: false, reconnect: false };
        At { at: format!("socket unit {id}"), value: Chardev { id: id.to_owned(), backend } }
    };
    for (id, role) in MONITORS {
        let (uids, gids) = who(id, access.remove(id))?;
        options.chardevs.push(socket(id));
        let monitor = Monitor { target: Target::Chardev(id.to_owned()), role, uids, gids };
        options.monitors.push(At { at: format!("socket unit {id}"), value: monitor });
    }
    if let Some(other) = access.keys().next() {
        return Err(format!("access: no role {other:?}: there are operator, monitor and console"));
    }
    if options.serial.is_none() && !options.nodefaults {
        options.chardevs.push(socket(SERIAL));
        let value = Target::Chardev(SERIAL.to_owned());
        options.serial = Some(At { at: "socket unit serial".to_owned(), value });
    }
    Ok(())
}

/// Users and groups that may connect; without a word of the file, root.
fn who(role: &str, value: Option<Value>) -> Result<(Vec<u32>, Vec<u32>), String> {
    let mut table = match value {
        None => return Ok((vec![0], Vec::new())),
        Some(Value::Table(table)) => table,
        Some(_) => return Err(format!("access.{role}: expects a table")),
    };
    let mut ids = |name: &str| {
        let expects = || format!("access.{role}.{name}: expects a list of numbers");
        let number = |value: &Value| {
            value
                .as_integer()
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| *n != u32::MAX)
                .ok_or_else(expects)
        };
        match table.remove(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(number).collect(),
            Some(value) => Ok(vec![number(&value)?]),
        }
    };
    let found = (ids("uid")?, ids("gid")?);
    if found.0.is_empty() && found.1.is_empty() {
        return Err(format!("access.{role}: names nobody: give uid or gid"));
    }
    match table.keys().next() {
        Some(other) => Err(format!("access.{role}: unknown key {other:?}: there are uid and gid")),
        None => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse("vm1", text).unwrap_err()
    }

    #[test]
    fn a_machine_file_has_the_options_of_the_command_line() {
        let machine = parse(
            "vm1",
            r#"
            m = "512M"
            smp = { cpus = 2, sockets = 1 }
            kernel = "vmlinuz"
            append = "console=ttyS0 a=b,c"
            no-reboot = true
            S = false
            chardev = [{ backend = "file", id = "log", path = "a,b", append = true }, { backend = "null", id = "n" }]
            serial = "chardev:log"
            [limits]
            MemoryMax = "1G"
            CPUWeight = 50
            [access.monitor]
            uid = [1000, 1001]
            [access.console]
            gid = 7
            "#,
        );
        let machine = machine.unwrap();
        let o = &machine.options;
        assert_eq!(
            (o.name.as_deref(), o.memory.ram, o.cpus.cpus, o.cpus.cores),
            (Some("vm1"), 512 << 20, 2, 2)
        );
        assert!(o.no_reboot && !o.stopped);
        assert_eq!(o.append.as_deref(), Some("console=ttyS0 a=b,c"));
        let ids: Vec<&str> = o.chardevs.iter().map(|c| c.value.id.as_str()).collect();
        assert_eq!(ids, ["log", "n", "operator", "monitor", "console"]);
        assert!(
            matches!(&o.chardevs[0].value.backend, Backend::File { path, append: true } if path == "a,b")
        );
        let who: Vec<_> = o
            .monitors
            .iter()
            .map(|m| (m.value.role, m.value.uids.as_slice(), m.value.gids.as_slice()))
            .collect();
        assert_eq!(
            who,
            [
                (Role::Operator, [0].as_slice(), [].as_slice()),
                (Role::Monitor, &[1000, 1001], &[]),
                (Role::Console, &[], &[7])
            ]
        );
        let limits = machine.limits.join(" ");
        assert_eq!(
            limits,
            "MemoryMax=1G MemorySwapMax=infinity TasksMax=infinity CPUWeight=50 CPUQuota= IOWeight="
        );
    }

    #[test]
    fn acpi_tables_are_texts_or_tables() {
        let text = r#"acpitable = ["a:b", { sig = "TEST", rev = 2, file = "c,d" }]"#;
        let tables = parse("vm1", text).unwrap().options.tables;
        let files = |number: usize| tables[number].value.files.join(" ");
        assert_eq!((files(0).as_str(), files(1).as_str(), tables.len()), ("a b", "c,d", 2));
        assert!(!tables[0].value.has_header && tables[1].value.has_header);
        assert_eq!((tables[1].value.header.sig, tables[1].value.header.rev), (Some(*b"TEST"), Some(2)));
    }

    #[test]
    fn an_empty_file_is_a_machine_with_sockets() {
        let options = parse("vm1", "").unwrap().options;
        let serial = options.serial.unwrap().value;
        assert_eq!(serial, Target::Chardev("serial".to_owned()));
        let last = &options.chardevs.last().unwrap().value.backend;
        let Backend::Socket { place: Place::Unit(path), server: true, wait: false, .. } = last else {
            panic!("{last:?}")
        };
        assert_eq!(path, "/run/bulkhead/vm1/serial");
        assert!(parse("vm1", "nodefaults = true").unwrap().options.serial.is_none());
    }

    #[test]
    fn what_is_wrong_is_named_in_one_line() {
        for (text, expected) in [
            ("foo = 1", "-foo: invalid option"),
            ("m = 1.5", "m: expects a text, a number, true or false"),
            ("m = \"x\"", "-m x: Parameter 'size' expects"),
            ("smp = { cpus = { a = 1 } }", "smp: cpus: expects a text"),
            ("limits = 1", "limits: expects a table"),
            ("limits = { Foo = 1 }", "limits: unknown limit \"Foo\": there are MemoryMax, "),
            ("limits = { MemoryMax = \"1G 2G\" }", "limits: MemoryMax expects one word or number"),
            ("access = { root = {} }", "access: no role \"root\": there are operator, monitor and console"),
            ("access = { monitor = {} }", "access.monitor: names nobody: give uid or gid"),
            ("access = { monitor = { uid = -1 } }", "access.monitor.uid: expects a list of numbers"),
            ("access = { monitor = { uid = 1, who = 2 } }", "access.monitor: unknown key \"who\""),
            ("pidfile = \"p\"", "-pidfile and -nographic are for bulkhead run"),
            ("help = true", "help and version are no options of a machine"),
            ("chardev = [[1]]", "chardev: expects texts or tables"),
            ("a b", "TOML parse error at line 1"),
        ] {
            let found = error(text);
            assert!(found.starts_with(expected) && !found.contains('\n'), "{text}: {found}");
        }
    }

    #[test]
    fn names_fit_users_slices_and_paths() {
        for good in ["a", "vm1", "tenant_7", "abcdefghijklmnop"] {
            assert_eq!(check_name(good), Ok(()));
        }
        for bad in ["", "1a", "a-b", "a.b", "A", "a/b", "..", "abcdefghijklmnopq", "ä"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
