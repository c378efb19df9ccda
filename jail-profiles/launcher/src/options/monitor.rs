//! Monitors: what they speak on, and what their clients may do.

use bulkhead_control_api::config::Role;

use super::Target;
use crate::cli::{Params, Problem};

/// The id that stands for every user or group without one of its own (the kernel's overflow id).
const OVERFLOW: u64 = 65534;

/// A QMP monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Monitor {
    /// What it speaks on.
    pub target: Target,
    /// What its clients may do.
    pub role: Role,
    /// User ids that may connect; empty: every one.
    pub uids: Vec<u32>,
    /// Group ids that may connect; empty: every one.
    pub gids: Vec<u32>,
}

impl Monitor {
    /// One whose clients may do everything.
    pub const fn open(target: Target) -> Self {
        Self { target, role: Role::Operator, uids: Vec::new(), gids: Vec::new() }
    }
}

/// A `-mon`. QEMU's default mode is readline.
pub fn monitor(params: &Params) -> Result<Monitor, Problem> {
    let id = params.text("chardev").ok_or(Problem::MissingParameter("chardev"))?;
    match params.text("mode") {
        Some("control") => {}
        None | Some("readline") => return Err(Problem::ReadlineMonitor),
        Some(other) => return Err(Problem::BadValue("mode", other.to_owned())),
    }
    if params.flag("pretty") == Some(true) {
        return Err(Problem::PrettyMonitor);
    }
    let role = match params.text("role") {
        None | Some("operator") => Role::Operator,
        Some("monitor") => Role::Monitor,
        Some("console") => Role::Console,
        Some(other) => return Err(Problem::BadValue("role", other.to_owned())),
    };
    let target = Target::Chardev(id.to_owned());
    Ok(Monitor { target, role, uids: ids(params, "uid")?, gids: ids(params, "gid")? })
}

fn ids(params: &Params, name: &'static str) -> Result<Vec<u32>, Problem> {
    let id = |number: u64| {
        let id = u32::try_from(number).ok().filter(|id| *id != u32::MAX);
        let id = id.ok_or_else(|| Problem::OutOfRange(name, number.to_string()))?;
        // Nobody can be told from anybody else by it.
        if number == OVERFLOW { Err(Problem::BadValue(name, number.to_string())) } else { Ok(id) }
    };
    params.numbers(name).map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::MON;

    fn parsed(text: &str) -> Result<Monitor, String> {
        Params::parse(&MON, text).and_then(|params| monitor(&params)).map_err(|e| e.to_string())
    }

    #[test]
    fn roles_and_lists() {
        let target = || Target::Chardev("a".to_owned());
        assert_eq!(parsed("a,mode=control"), Ok(Monitor::open(target())));
        let text = "a,mode=control,role=monitor,uid=1000,gid=5,uid=0,uid=4294967294";
        let limited = Monitor {
            target: target(),
            role: Role::Monitor,
            uids: vec![1000, 0, 4_294_967_294],
            gids: vec![5],
        };
        assert_eq!(parsed(text), Ok(limited));
        assert_eq!(parsed("a,mode=control,role=console").map(|m| m.role), Ok(Role::Console));
        assert_eq!(parsed("a,mode=control,role=operator").map(|m| m.role), Ok(Role::Operator));
    }

    #[test]
    fn refused_roles_and_lists() {
        for (text, error) in [
            ("role=root", "Parameter 'role' does not accept value 'root'"),
            ("uid=root", "Parameter 'uid' expects a number"),
            ("uid=-1", "Parameter 'uid' expects a number"),
            ("gid=1:2", "Parameter 'gid' expects a number"),
            ("uid=1,uid=4294967295", "Value '4294967295' is out of range for parameter 'uid'"),
            ("gid=4294967296", "Value '4294967296' is out of range for parameter 'gid'"),
            ("uid=65534", "Parameter 'uid' does not accept value '65534'"),
            ("gid=65534", "Parameter 'gid' does not accept value '65534'"),
        ] {
            assert_eq!(parsed(&format!("a,mode=control,{text}")).unwrap_err(), error, "{text}");
        }
    }
}
