//! `docs/PROCESSES.md` says what `topology.toml` says.

use std::fmt::{self, Write as _};

use bulkhead_jail::topology::{Boots, FileSize, LINKS, Link, PROCESSES, Process, Restart};

const BEGIN: &str = "<!-- derived from topology.toml -->\n";
const END: &str = "<!-- end of the derived part -->\n";

fn process(out: &mut String, process: &Process) -> fmt::Result {
    let spaces: Vec<String> = process.namespaces.iter().map(|n| format!("{n:?}").to_lowercase()).collect();
    let fds: Vec<String> = process.fds.iter().map(|f| format!("`{f}`")).collect();
    let started = match process.boots {
        Boots::Vm if process.per_device => "with the VM, one for each device that needs one",
        Boots::Vm => "with the VM",
        Boots::Boot => "anew for each boot and reset",
        Boots::Job => "anew for each job",
    };
    let fsize = match process.limits.fsize {
        FileSize::Bytes(bytes) => format!("{bytes} bytes"),
        FileSize::Ram => "the size of guest RAM, at least 256 MiB".into(),
        FileSize::Unlimited => "unlimited".into(),
    };
    writeln!(out, "### {} (`{}`)\n\n{}.\n", process.name, process.binary, process.about)?;
    let again = match process.restart {
        Restart::Never => "",
        Restart::Always => "; again, for ever, when it dies",
    };
    writeln!(out, "- Started {started}{again}.")?;
    writeln!(out, "- Namespaces of its own: {}.", spaces.join(", "))?;
    for gap in process.gaps {
        let missing: Vec<String> = gap.namespaces.iter().map(|n| format!("{n:?}").to_lowercase()).collect();
        let (why, instead) = (gap.why, gap.substitute);
        writeln!(
            out,
            "- Not under the starter `{}`: {} ({why}); instead: {instead}.",
            gap.starter,
            missing.join(", ")
        )?;
    }
    let kept = match process.store {
        0 => String::new(),
        most => format!("; of these its starter keeps at most {most} beyond its death (`state`, `kept.*`)"),
    };
    writeln!(out, "- Descriptors: {}{kept}.", fds.join(", "))?;
    writeln!(
        out,
        "- At most {} descriptors, {} MiB of private memory, file size {fsize}.",
        process.limits.nofile,
        process.limits.data >> 20
    )?;
    writeln!(
        out,
        "- System calls after its start ({}): {}.\n",
        process.syscalls.len(),
        process.syscalls.join(", ")
    )?;
    Ok(())
}

fn link(out: &mut String, link: &Link) -> fmt::Result {
    let (asker, answerer) =
        if link.listener_asks { (link.listener, link.connector) } else { (link.connector, link.listener) };
    let requests: Vec<String> = link
        .requests
        .iter()
        .map(|p| {
            if p.states.len() == 6 {
                p.request.into()
            } else {
                format!("{} ({})", p.request, p.states.join(", "))
            }
        })
        .collect();
    let requests = if requests.is_empty() {
        "messages of its own protocol".into()
    } else {
        format!("{asker} asks {answerer}: {}", requests.join(", "))
    };
    writeln!(out, "| `{}` | {} | {} | {requests} |", link.name, link.listener, link.connector)?;
    Ok(())
}

fn derived() -> Result<String, fmt::Error> {
    let mut out = String::new();
    for p in PROCESSES {
        process(&mut out, p)?;
    }
    out.push_str("### Links\n\n| link | listener | connector | requests |\n| --- | --- | --- | --- |\n");
    for l in LINKS {
        link(&mut out, l)?;
    }
    out.push('\n');
    Ok(out)
}

#[test]
fn the_process_page_follows_the_topology() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/PROCESSES.md");
    let text = derived().unwrap();
    let page = std::fs::read_to_string(path).unwrap();
    let (head, rest) = page.split_once(BEGIN).expect("the page has the first marker");
    let (found, tail) = rest.split_once(END).expect("the page has the second marker");
    if found != text && std::env::var_os("BLESS").is_some() {
        std::fs::write(path, format!("{head}{BEGIN}{}{END}{tail}", text)).unwrap();
        return;
    }
    assert!(
        found == text,
        "docs/PROCESSES.md is out of date: run BLESS=1 cargo test -p bulkhead-jail --test docs"
    );
}
