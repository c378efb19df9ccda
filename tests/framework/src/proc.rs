//! What /proc says about the processes of a VM.

use std::collections::BTreeMap;
use std::fs;

use crate::{Failure, Result};

/// One process as /proc shows it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Parent's process id.
    pub parent: i32,
    /// Name, as `ps` shows it (the kernel keeps 15 bytes).
    pub name: String,
    /// Effective user id.
    pub uid: u32,
    /// Seccomp mode: 0 off, 2 filter.
    pub seccomp: u32,
    /// The process can gain no privileges by exec.
    pub no_new_privs: bool,
    /// Effective, permitted and bounding capabilities.
    pub capabilities: [u64; 3],
    /// Namespace kind ("user", "mnt", "pid", "net", "ipc", "uts") to its identity.
    pub namespaces: BTreeMap<String, String>,
}

impl Process {
    /// True if it holds capabilities. What the bounding set still lists, no_new_privs keeps out of reach.
    pub fn has_capabilities(&self) -> bool {
        let [effective, permitted, _] = self.capabilities;
        effective | permitted != 0
    }

    /// True if this process is in another namespace of `kind` than `other`; false when either is unreadable.
    pub fn is_apart(&self, other: &Process, kind: &str) -> bool {
        matches!((self.namespaces.get(kind), other.namespaces.get(kind)), (Some(ours), Some(theirs)) if ours != theirs)
    }
}

/// Reads one process.
///
/// # Errors
/// It does not exist.
pub fn process(pid: i32) -> Result<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .map_err(|error| Failure::new(format!("process {pid}: {error}")))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim()
    };
    let hex = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(u64::MAX);
    Ok(Process {
        pid,
        parent: field("PPid").parse().unwrap_or(0),
        name: field("Name").to_owned(),
        uid: field("Uid").split_whitespace().nth(1).and_then(|uid| uid.parse().ok()).unwrap_or(u32::MAX),
        seccomp: field("Seccomp").parse().unwrap_or(0),
        no_new_privs: field("NoNewPrivs") == "1",
        capabilities: [hex("CapEff"), hex("CapPrm"), hex("CapBnd")],
        namespaces: namespaces(pid),
    })
}

fn namespaces(pid: i32) -> BTreeMap<String, String> {
    let kinds = ["user", "mnt", "pid", "net", "ipc", "uts"];
    let read = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    kinds.into_iter().filter_map(|kind| Some((kind.to_owned(), read(kind)?.display().to_string()))).collect()
}

/// All living descendants of `pid`, children before grandchildren.
///
/// # Errors
/// /proc is unreadable.
pub fn descendants(pid: i32) -> Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        // A process may end between the listing and the reading.
        if let Some(found) =
            name.to_str().and_then(|name| name.parse().ok()).and_then(|pid| process(pid).ok())
        {
            all.push(found);
        }
    }
    let mut family: Vec<Process> = Vec::new();
    let mut parents = vec![pid];
    while !parents.is_empty() {
        let (children, rest): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|process| parents.contains(&process.parent));
        parents = children.iter().map(|child| child.pid).collect();
        family.extend(children);
        all = rest;
    }
    Ok(family)
}

/// Proportional set size of a process, in KiB.
///
/// # Errors
/// The process is gone, or not ours to look at.
pub fn pss_kib(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).map_err(|error| Failure::new(format!("{path}: {error}")))?;
    text.lines().find_map(pss_line).ok_or_else(|| Failure::new(format!("{path} has no Pss line")))
}

/// Proportional set size, in KiB, of the mappings of a process whose name satisfies `wanted` (a memfd is
/// `/memfd:NAME (deleted)`).
///
/// # Errors
/// The process is gone, or not ours to look at.
pub fn mapped_pss_kib(pid: i32, wanted: impl Fn(&str) -> bool) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).map_err(|error| Failure::new(format!("{path}: {error}")))?;
    let mut counted = false;
    let mut sum = 0;
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            // address permissions offset device inode name
            let name: Vec<&str> = line.split_whitespace().skip(5).collect();
            counted = wanted(&name.join(" "));
        } else if counted {
            sum += pss_line(line).unwrap_or(0);
        }
    }
    Ok(sum)
}

fn pss_line(line: &str) -> Option<u64> {
    line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_itself_and_its_children() {
        let own = i32::try_from(std::process::id()).unwrap();
        let child =
            crate::Child::start(std::process::Command::new("sleep").arg("1000"), "out", "err").unwrap();
        let family = descendants(own).unwrap();
        let found = family.iter().find(|process| process.pid == child.pid()).unwrap();
        assert_eq!(found.parent, own);
        assert_eq!(found.uid, process(own).unwrap().uid);
        assert!(!found.is_apart(&process(own).unwrap(), "net"));
        assert_eq!(found.namespaces.len(), 6);
    }

    #[test]
    fn measures_memory() {
        let own = i32::try_from(std::process::id()).unwrap();
        let all = pss_kib(own).unwrap();
        let mapped = mapped_pss_kib(own, |_| true).unwrap();
        assert!(all > 0 && mapped > 0);
        assert_eq!(mapped_pss_kib(own, |name| name.starts_with("/memfd:none")).unwrap(), 0);
    }
}
