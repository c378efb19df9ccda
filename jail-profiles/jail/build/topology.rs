//! `topology.toml` as Rust constants.

use std::{error::Error, fmt::Write as _, fs, path::Path};

use serde::Deserialize;

use crate::profile;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    /// Gaps of all processes.
    gap: Vec<Gap>,
    process: Vec<Process>,
    link: Vec<Link>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Process {
    name: String,
    binary: String,
    about: String,
    boots: String,
    per: Option<String>,
    restart: String,
    namespaces: Vec<String>,
    fds: Vec<String>,
    #[serde(default)]
    store: usize,
    limits: Limits,
    #[serde(default)]
    gap: Vec<Gap>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    nofile: u64,
    /// In MiB.
    data: u64,
    fsize: toml::Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gap {
    starter: String,
    namespaces: Vec<String>,
    why: String,
    substitute: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Link {
    name: String,
    listener: String,
    connector: String,
    #[serde(rename = "as")]
    as_name: String,
    #[serde(default)]
    asks: Option<String>,
    #[serde(default)]
    requests: Vec<Request>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    name: String,
    states: Option<Vec<String>>,
}

const STATES: [&str; 6] = ["prelaunch", "running", "paused", "shutdown", "internal-error", "guest-panicked"];

fn namespaces(names: &[String]) -> Result<String, Box<dyn Error>> {
    let mut out = String::from("&[");
    for name in names {
        let variant = match name.as_str() {
            "user" => "User",
            "mount" => "Mount",
            "pid" => "Pid",
            "net" => "Net",
            "ipc" => "Ipc",
            "uts" => "Uts",
            other => return Err(format!("no namespace {other}").into()),
        };
        write!(out, "Namespace::{variant},")?;
    }
    Ok(out + "]")
}

fn gaps(all: &[Gap], process: &Process) -> Result<String, Box<dyn Error>> {
    let mut out = String::from("&[");
    for gap in process.gap.iter().chain(all) {
        let missing: Vec<String> =
            gap.namespaces.iter().filter(|n| process.namespaces.contains(n)).cloned().collect();
        write!(
            out,
            "Gap {{ starter: {:?}, namespaces: {}, why: {:?}, substitute: {:?} }},",
            gap.starter,
            namespaces(&missing)?,
            gap.why,
            gap.substitute
        )?;
    }
    Ok(out + "]")
}

fn process(out: &mut String, root: &Path, process: &Process, all: &[Gap]) -> Result<(), Box<dyn Error>> {
    let profile = profile::compile(root, &process.name)?;
    let fsize = match &process.limits.fsize {
        toml::Value::Integer(bytes) => format!("FileSize::Bytes({bytes})"),
        toml::Value::String(word) if word == "ram" => "FileSize::Ram".into(),
        toml::Value::String(word) if word == "unlimited" => "FileSize::Unlimited".into(),
        other => return Err(format!("{}: fsize {other}", process.name).into()),
    };
    let boots = match process.boots.as_str() {
        "vm" => "Boots::Vm",
        "boot" => "Boots::Boot",
        "job" => "Boots::Job",
        other => return Err(format!("{}: boots {other}", process.name).into()),
    };
    let restart = match process.restart.as_str() {
        "never" => "Restart::Never",
        "always" => "Restart::Always",
        other => return Err(format!("{}: restart {other}", process.name).into()),
    };
    let per_device = match process.per.as_deref() {
        None => false,
        Some("device") => true,
        Some(other) => return Err(format!("{}: per {other}", process.name).into()),
    };
    let mut bpf = String::from("&[");
    for i in &profile.bpf {
        write!(bpf, "sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},", i.code, i.jt, i.jf, i.k)?;
    }
    bpf.push(']');
    writeln!(
        out,
        "/// {about}.\npub static {upper}: Process = Process {{ name: {name:?}, binary: {binary:?}, about: {about:?}, \
         boots: {boots}, per_device: {per_device}, restart: {restart}, namespaces: {spaces}, gaps: {gaps}, fds: &{fds:?}, store: {store}, \
         limits: Limits {{ nofile: {nofile}, data: {data}, fsize: {fsize} }}, syscalls: &{syscalls:?}, filter: {bpf} }};",
        about = process.about,
        upper = process.name.to_uppercase(),
        name = process.name,
        binary = process.binary,
        spaces = namespaces(&process.namespaces)?,
        gaps = gaps(all, process)?,
        fds = process.fds,
        store = process.store,
        nofile = process.limits.nofile,
        data = process.limits.data << 20,
        syscalls = profile.syscalls,
    )?;
    Ok(())
}

fn link(out: &mut String, link: &Link, names: &[&str]) -> Result<(), Box<dyn Error>> {
    for end in [&link.listener, &link.connector] {
        if !names.contains(&end.as_str()) {
            return Err(format!("link {}: no process {end}", link.name).into());
        }
    }
    let mut requests = String::from("&[");
    for request in &link.requests {
        let states = match &request.states {
            None => STATES.iter().map(|s| (*s).to_owned()).collect(),
            Some(states) => states.clone(),
        };
        if let Some(bad) = states.iter().find(|s| !STATES.contains(&s.as_str())) {
            return Err(format!("link {}: no run state {bad}", link.name).into());
        }
        write!(requests, "Permit {{ request: {:?}, states: &{:?} }},", request.name, states)?;
    }
    requests.push(']');
    let asks = match link.asks.as_deref() {
        None | Some("connector") => false,
        Some("listener") => true,
        Some(other) => return Err(format!("link {}: asks {other}", link.name).into()),
    };
    writeln!(
        out,
        "/// Link `{name}`.\npub static LINK_{upper}: Link = Link {{ name: {name:?}, listener: {listener:?}, \
         connector: {connector:?}, as_name: {as_name:?}, listener_asks: {asks}, requests: {requests} }};",
        name = link.name,
        upper = link.name.to_uppercase().replace('-', "_"),
        listener = link.listener,
        connector = link.connector,
        as_name = link.as_name,
    )?;
    Ok(())
}

/// The constants of the whole file.
pub fn generate(root: &Path) -> Result<String, Box<dyn Error>> {
    let file: File = toml::from_str(&fs::read_to_string(root.join("topology.toml"))?)?;
    if file.version != 1 {
        return Err(format!("topology.toml: version {} is not 1", file.version).into());
    }
    let names: Vec<&str> = file.process.iter().map(|p| p.name.as_str()).collect();
    let mut out = String::new();
    for p in &file.process {
        process(&mut out, root, p, &file.gap)?;
    }
    for l in &file.link {
        link(&mut out, l, &names)?;
    }
    let refs = |prefix: &str, names: Vec<String>| {
        names
            .iter()
            .fold(String::new(), |acc, n| acc + &format!("&{prefix}{},", n.to_uppercase().replace('-', "_")))
    };
    let processes = refs("", names.iter().map(|n| (*n).to_owned()).collect());
    let links = refs("LINK_", file.link.iter().map(|l| l.name.clone()).collect());
    writeln!(
        out,
        "/// All processes in the order of the file.\npub static PROCESSES: &[&Process] = &[{processes}];"
    )?;
    writeln!(out, "/// All links in the order of the file.\npub static LINKS: &[&Link] = &[{links}];")?;
    Ok(out)
}
