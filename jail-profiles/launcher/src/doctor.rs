//! `bulkhead doctor`: what this host can do, what is missing, and the remedy.
//!
//! Nothing is guessed from versions: each line comes from trying the thing itself.

mod kvm;
mod sandbox;
mod sys;

use std::fmt::Write as _;
use std::fs;

use nix::errno::Errno;

use crate::cli::help;
use kvm::{Kvm, Ring0};
use sandbox::Blocked;

/// What runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Unmodified kernels.
    Full,
    /// Only the native guest.
    Limited,
    /// Nothing.
    None,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Limited => "limited",
            Self::None => "none",
        }
    }

    /// Exit status; 1 and 2 are left to errors.
    fn status(self) -> u8 {
        match self {
            Self::Full => 0,
            Self::Limited => 3,
            Self::None => 4,
        }
    }
}

/// What was found.
struct Facts {
    /// KVM, or why it cannot be opened.
    kvm: Result<Kvm, String>,
    namespaces: Result<(), Blocked>,
    /// ABI number.
    landlock: Result<u32, Errno>,
    /// Filter actions that the kernel lacks.
    seccomp: Result<(), Vec<&'static str>>,
    memfd: Result<(), String>,
    cgroups: String,
}

/// Prints the report; the exit status says the class.
///
/// # Errors
/// One line, if the report cannot be printed.
pub fn run() -> Result<u8, String> {
    let facts = Facts {
        kvm: kvm::look(),
        namespaces: sandbox::namespaces(),
        landlock: sys::landlock_abi(),
        seccomp: sandbox::seccomp_actions(),
        memfd: sandbox::sealed_memfd(),
        cgroups: cgroups(),
    };
    let (text, class) = report(&facts);
    help::print(&text)?;
    Ok(class.status())
}

/// The lines of a report.
struct Lines(String);

impl Lines {
    fn add(&mut self, topic: &str, state: &str, text: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{topic:<11} {state:<8} {text}");
    }

    fn remedy(&mut self, text: &str) {
        let _ = writeln!(self.0, "{:<11} {:<8} {text}", "", "remedy:");
    }
}

fn report(facts: &Facts) -> (String, Class) {
    let mut lines = Lines(String::new());
    let kvm = report_kvm(&mut lines, &facts.kvm);
    let jails = [
        report_namespaces(&mut lines, facts.namespaces),
        report_landlock(&mut lines, facts.landlock),
        report_seccomp(&mut lines, &facts.seccomp),
        report_memfd(&mut lines, &facts.memfd),
    ];
    lines.add("cgroups", "info", &facts.cgroups);
    // A process that cannot enter its jail refuses to run.
    let class = if jails.contains(&false) { Class::None } else { kvm };
    let _ = writeln!(lines.0, "class: {}", class.name());
    (lines.0, class)
}

fn report_kvm(lines: &mut Lines, kvm: &Result<Kvm, String>) -> Class {
    let kvm = match kvm {
        Ok(kvm) => kvm,
        Err(why) => {
            lines.add("KVM", "missing", why);
            return Class::None;
        }
    };
    if !kvm.missing.is_empty() {
        lines.add("KVM", "missing", &format!("API {}, without {}", kvm.api, kvm.missing.join(", ")));
        lines.remedy("a newer kernel");
        return Class::None;
    }
    let lacking = match kvm.lacking.as_slice() {
        [] => String::new(),
        names => format!(", but for {} (slower or less exact)", names.join(", ")),
    };
    let text = format!("API {}, all needed capabilities, up to {} vCPUs{lacking}", kvm.api, kvm.max_cpus);
    lines.add("KVM", "ok", &text);
    let flag = kvm.flag.unwrap_or("no vmx or svm flag");
    match &kvm.ring0 {
        Ring0::Native => {
            lines.add("guest code", "ok", &format!("runs natively in ring 0 ({flag})"));
            Class::Full
        }
        Ring0::Emulated => {
            let text = format!("ring 0 is emulated, in part ({flag}): the native guest runs, kernels do not");
            lines.add("guest code", "limited", &text);
            lines.remedy("a machine, or an enclosing VM, with (nested) hardware virtualization");
            Class::Limited
        }
        Ring0::Failed(why) => {
            lines.add("guest code", "missing", &format!("a trial VM does not run ({flag}): {why}"));
            Class::None
        }
    }
}

fn report_namespaces(lines: &mut Lines, namespaces: Result<(), Blocked>) -> bool {
    let Err(blocked) = namespaces else {
        lines.add("namespaces", "ok", "user, mount, pid, net, ipc, uts");
        return true;
    };
    lines.add("namespaces", "missing", &format!("{}: {}", blocked.step, blocked.errno.desc()));
    let knob = |path: &str, bad: &str| fs::read_to_string(path).is_ok_and(|value| value.trim() == bad);
    lines.remedy(if knob("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "sudo sysctl kernel.unprivileged_userns_clone=1"
    } else if knob("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with `userns`"
    } else if blocked.errno == Errno::ENOSPC {
        "raise the limits in /proc/sys/user (max_user_namespaces and the others)"
    } else {
        "outside of a chroot or container, or in a container that permits user namespaces"
    });
    false
}

fn report_landlock(lines: &mut Lines, landlock: Result<u32, Errno>) -> bool {
    let errno = match landlock {
        Ok(abi) => {
            lines.add("Landlock", "ok", &format!("ABI {abi}"));
            return true;
        }
        Err(errno) => errno,
    };
    lines.add("Landlock", "missing", errno.desc());
    lines.remedy(match errno {
        Errno::EOPNOTSUPP => "add landlock to the list lsm= of the kernel's command line",
        Errno::ENOSYS => "a kernel from 5.13 on with CONFIG_SECURITY_LANDLOCK",
        _ => "outside of a container, or in one whose filter permits landlock_create_ruleset",
    });
    false
}

fn report_seccomp(lines: &mut Lines, seccomp: &Result<(), Vec<&'static str>>) -> bool {
    match seccomp {
        Ok(()) => lines.add("seccomp", "ok", &format!("filters: {}", sandbox::ACTION_NAMES.join(", "))),
        Err(missing) => {
            lines.add("seccomp", "missing", &format!("filters without {}", missing.join(", ")));
            lines.remedy("a kernel from 4.14 on with CONFIG_SECCOMP_FILTER");
        }
    }
    seccomp.is_ok()
}

fn report_memfd(lines: &mut Lines, memfd: &Result<(), String>) -> bool {
    match memfd {
        Ok(()) => lines.add("memfd", "ok", "can be sealed"),
        Err(why) => {
            lines.add("memfd", "missing", why);
            lines.remedy("outside of a container, or in one whose filter permits memfd_create");
        }
    }
    memfd.is_ok()
}

fn cgroups() -> String {
    if let Ok(controllers) = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        return format!("v2 with {}", controllers.trim());
    }
    let mut names: Vec<String> = fs::read_dir("/sys/fs/cgroup")
        .map(|entries| entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort_unstable();
    let what =
        if names.is_empty() { "none mounted".to_owned() } else { format!("v1 ({})", names.join(", ")) };
    format!("{what}: no limits by systemd slices")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good_kvm(ring0: Ring0) -> Kvm {
        Kvm { api: 12, missing: vec![], lacking: vec![], max_cpus: 64, flag: Some("svm"), ring0 }
    }

    fn facts(kvm: Result<Kvm, String>) -> Facts {
        Facts {
            kvm,
            namespaces: Ok(()),
            landlock: Ok(7),
            seccomp: Ok(()),
            memfd: Ok(()),
            cgroups: "v2 with memory".to_owned(),
        }
    }

    fn class(facts: &Facts) -> Class {
        let (text, class) = report(facts);
        assert!(text.ends_with(&format!("\nclass: {}\n", class.name())), "{text}");
        class
    }

    #[test]
    fn a_good_host() {
        let (text, class) = report(&facts(Ok(good_kvm(Ring0::Native))));
        let expected = "\
KVM         ok       API 12, all needed capabilities, up to 64 vCPUs
guest code  ok       runs natively in ring 0 (svm)
namespaces  ok       user, mount, pid, net, ipc, uts
Landlock    ok       ABI 7
seccomp     ok       filters: kill_process, trap, errno
memfd       ok       can be sealed
cgroups     info     v2 with memory
class: full
";
        assert_eq!((text.as_str(), class.status()), (expected, 0));
    }

    #[test]
    fn kvm_decides_between_full_and_limited() {
        let limited = facts(Ok(good_kvm(Ring0::Emulated)));
        assert_eq!((class(&limited), Class::Limited.status()), (Class::Limited, 3));
        let (text, _) = report(&limited);
        assert!(text.contains("ring 0 is emulated, in part (svm): the native guest runs, kernels do not"));
        assert!(
            text.contains("remedy:  a machine, or an enclosing VM, with (nested) hardware virtualization")
        );
        assert_eq!(class(&facts(Ok(good_kvm(Ring0::Failed("x".into()))))), Class::None);
        assert_eq!((class(&facts(Err("missing".into()))), Class::None.status()), (Class::None, 4));
        let mut old = good_kvm(Ring0::Native);
        old.missing = vec!["KVM_CAP_IRQFD"];
        let (text, found) = report(&facts(Ok(old)));
        assert_eq!(found, Class::None);
        assert!(text.contains("API 12, without KVM_CAP_IRQFD") && text.contains("remedy:  a newer kernel"));
    }

    #[test]
    fn without_a_jail_nothing_runs() {
        let good = || facts(Ok(good_kvm(Ring0::Native)));
        let mut broken = good();
        broken.namespaces = Err(Blocked { step: "unshare", errno: Errno::ENOSPC });
        assert!(report(&broken).0.contains("unshare: No space left on device"));
        assert_eq!(class(&broken), Class::None);
        for (errno, remedy) in [
            (Errno::EOPNOTSUPP, "add landlock to the list lsm="),
            (Errno::ENOSYS, "a kernel from 5.13 on"),
            (Errno::EPERM, "outside of a container"),
        ] {
            let mut broken = good();
            broken.landlock = Err(errno);
            assert!(report(&broken).0.contains(remedy));
            assert_eq!(class(&broken), Class::None);
        }
        let mut broken = good();
        broken.seccomp = Err(vec!["trap"]);
        assert!(report(&broken).0.contains("filters without trap"));
        assert_eq!(class(&broken), Class::None);
        let mut broken = good();
        broken.memfd = Err("Function not implemented".into());
        assert_eq!(class(&broken), Class::None);
    }
}
