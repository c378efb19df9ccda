//! Runs cases on one L1 for each of the host's processors, and prints what comes of them.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_framework::{Failure, Result, target_dir};

use super::build;
use super::image::{Content, Image, Kind};
use super::machine::{Line, Machine};
use crate::agent::cases::{Case, LONG};
use crate::agent::figures;

/// How long a case may take; the waits inside it are shorter and explain more.
const CASE: Duration = Duration::from_secs(240);

/// How long one of the cases may take that run when they are named only.
const LONG_CASE: Duration = Duration::from_secs(1200);

/// How often one case may lose its L1. An L1 under QEMU's emulation stops for good now and then, its kernel and
/// the agent with it; a case that fails says so by itself, through the agent.
const LOST: u32 = 1;

/// How long the native tests, the demonstration or a command may take.
const PROGRAM: Duration = Duration::from_secs(1500);

/// How the lab is to run.
pub struct Options {
    /// L1s side by side. Each keeps one processor of the host busy.
    pub jobs: usize,
    /// A directory tree to lay over L1's root.
    pub overlay: Option<PathBuf>,
    /// The L1 of a shell command.
    pub kind: Kind,
    /// Debian's QEMU is in L1, too.
    pub qemu: bool,
}

/// Runs `cases` and prints a line for each. True if all passed.
///
/// # Errors
/// The lab itself cannot run.
pub fn run(cases: &[&'static Case], options: &Options) -> Result<bool> {
    let start = Instant::now();
    let needed = |kind: &Kind| cases.iter().any(|case| case.kind == *kind);
    let kinds: Vec<Kind> = [Kind::Systemd, Kind::Busybox].into_iter().filter(needed).collect();
    let lab = Lab::prepare(options, &kinds, Vec::new())?;
    println!("lab: prepared in {:.1} s, {} cases", start.elapsed().as_secs_f32(), cases.len());
    let queue = Mutex::new(cases.iter().map(|case| (*case, 0)).collect::<Queue>());
    let failed = Mutex::new(0);
    let workers = options.jobs.clamp(1, cases.len().max(1));
    let stopped = std::thread::scope(|scope| {
        let work = |worker| lab.work(worker, &queue, &failed);
        let threads: Vec<_> = (0..workers).map(|worker| scope.spawn(move || work(worker))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()?.err()).next()
    });
    if let Some(failure) = stopped {
        return Err(failure);
    }
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "lab result: {} passed, {failed} failed in {:.1} s; logs in {}",
        cases.len() - failed,
        start.elapsed().as_secs_f32(),
        lab.logs.display()
    );
    Ok(failed == 0)
}

/// Runs the native test programs in L1 with `args` and passes on their output. True if all passed.
///
/// # Errors
/// As [`run`].
pub fn native(args: &[String], options: &Options) -> Result<bool> {
    let tests = build::native_tests()?;
    let names: Vec<String> = tests
        .iter()
        .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    let lab = Lab::prepare(options, &[Kind::Busybox], tests)?;
    let mut machine = lab.boot(Kind::Busybox, "native")?;
    let mut passed = true;
    for name in names {
        passed &=
            lab.program(&mut machine, &format!("exec {}/{name} {}", crate::paths::TESTS, args.join(" ")))?;
    }
    Ok(passed)
}

/// Measures all figures, or those whose name contains one of the words, each in an L1 of its own, and prints their samples.
/// True if all could be measured.
///
/// # Errors
/// As [`run`].
pub fn figures(words: &[String], options: &Options) -> Result<bool> {
    let lab = Lab::prepare(options, &[Kind::Busybox], Vec::new())?;
    let mut measured = true;
    let chosen =
        |case: &&Case| words.is_empty() || words.iter().any(|word| case.name.contains(word.as_str()));
    for case in figures::ALL.iter().filter(chosen) {
        let mut logs = BTreeMap::<String, String>::new();
        let mut machine = lab.boot(case.kind, case.name)?;
        let outcome = machine.request(&format!("run {}", case.name), PROGRAM, |line| match line {
            Line::Log(name, text) => {
                let log = logs.entry(name).or_default();
                log.push_str(&text);
                log.push('\n');
            }
            Line::Out(text) => println!("{text}"),
        })?;
        lab.keep(case.name, &logs, outcome.as_ref().err().map(String::as_str))?;
        if let Err(reason) = outcome {
            println!("{}: {reason}", case.name);
            measured = false;
        }
    }
    Ok(measured)
}

/// Runs a shell command in L1 and passes on its output. True if its status is 0.
///
/// # Errors
/// As [`run`].
pub fn shell(command: &str, options: &Options) -> Result<bool> {
    let lab = Lab::prepare(options, &[options.kind], Vec::new())?;
    lab.program(&mut lab.boot(options.kind, "shell")?, &format!("exec {command}"))
}

/// Shows the Debian guest in L1. True if all went well.
///
/// # Errors
/// As [`run`].
pub fn demo(options: &Options) -> Result<bool> {
    let lab = Lab::prepare(options, &[Kind::Busybox], Vec::new())?;
    lab.program(&mut lab.boot(Kind::Busybox, "demo")?, "demo")
}

/// Cases to run, each with the number of L1s that it has lost.
type Queue = VecDeque<(&'static Case, u32)>;

/// What all L1s of one invocation share.
struct Lab {
    images: Vec<Image>,
    logs: PathBuf,
}

impl Lab {
    fn prepare(options: &Options, kinds: &[Kind], tests: Vec<PathBuf>) -> Result<Self> {
        let (programs, back_ends) = (build::product()?, build::back_ends()?);
        let dir = target_dir().join("lab");
        let logs = dir.join("logs");
        fs::create_dir_all(&logs).map_err(|error| Failure::new(format!("{}: {error}", logs.display())))?;
        let content =
            Content { programs, back_ends, tests, qemu: options.qemu, overlay: options.overlay.clone() };
        let images = kinds.iter().map(|kind| Image::build(*kind, &content, &dir)).collect::<Result<_>>()?;
        Ok(Self { images, logs: fs::canonicalize(logs)? })
    }

    fn boot(&self, kind: Kind, name: &str) -> Result<Machine> {
        let image = self.images.iter().find(|image| image.kind == kind).ok_or("no image of this kind")?;
        let machine = Machine::boot(image, &self.logs.join(format!("l1-{name}.log")))?;
        println!("lab: L1 {name} is up after {:.1} s", machine.boot.as_secs_f32());
        Ok(machine)
    }

    /// Takes cases from `queue` until it is empty. An L1 that ended or hung is replaced, as is one of the other kind
    /// when no case is left for it.
    fn work(&self, worker: usize, queue: &Mutex<Queue>, failed: &Mutex<usize>) -> Result<()> {
        // The workers start from both ends, so that few L1s are booted.
        let ends = [Kind::Systemd, Kind::Busybox];
        let mut kind = ends.get(worker % ends.len()).copied().unwrap_or(Kind::Busybox);
        let mut machine = None;
        loop {
            let next = take(&mut queue.lock().unwrap_or_else(PoisonError::into_inner), kind);
            let Some((case, lost)) = next else { return Ok(()) };
            if case.kind != kind {
                machine = None;
                kind = case.kind;
            }
            let mut l1 = match machine.take() {
                Some(l1) => l1,
                None => self.boot(kind, &worker.to_string())?,
            };
            let start = Instant::now();
            let mut logs = BTreeMap::<String, String>::new();
            let limit = if LONG.iter().any(|long| long.name == case.name) { LONG_CASE } else { CASE };
            let result = l1.request(&format!("run {}", case.name), limit, |line| match line {
                Line::Log(name, text) => {
                    let log = logs.entry(name).or_default();
                    log.push_str(&text);
                    log.push('\n');
                }
                Line::Out(text) => println!("     {:<28} {text}", case.name),
            });
            let seconds = start.elapsed().as_secs_f32();
            let reason = match result {
                Ok(outcome) => {
                    machine = Some(l1);
                    outcome.err()
                }
                Err(failure) if lost < LOST => {
                    println!(
                        "lab: L1 {worker} is lost after {seconds:.1} s of {}, which runs again",
                        case.name
                    );
                    self.keep(&format!("{}-lost", case.name), &logs, Some(&failure.to_string()))?;
                    queue.lock().unwrap_or_else(PoisonError::into_inner).push_front((case, lost + 1));
                    continue;
                }
                Err(failure) => Some(failure.to_string()),
            };
            self.keep(case.name, &logs, reason.as_deref())?;
            match reason {
                None => println!("pass {:<28} {seconds:6.1} s", case.name),
                Some(reason) => {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                    println!("FAIL {:<28} {seconds:6.1} s\n{reason}\n", case.name);
                }
            }
        }
    }

    /// Writes what a case left to one file.
    fn keep(&self, name: &str, logs: &BTreeMap<String, String>, reason: Option<&str>) -> Result<()> {
        let mut text: String = logs.iter().map(|(name, log)| format!("--- {name}\n{log}\n")).collect();
        if let Some(reason) = reason {
            text.push_str(&format!("--- failed\n{reason}\n"));
        }
        let path = self.logs.join(format!("{name}.log"));
        write(&path, &text)
    }

    /// Runs one request and prints its output as it comes.
    fn program(&self, machine: &mut Machine, request: &str) -> Result<bool> {
        let outcome = machine.request(request, PROGRAM, |line| {
            if let Line::Out(text) = line {
                println!("{text}");
            }
        })?;
        if let Err(reason) = &outcome {
            eprintln!("{reason}");
        }
        Ok(outcome.is_ok())
    }
}

/// The next case for an L1 of this kind, or for one of the other.
fn take(queue: &mut Queue, kind: Kind) -> Option<(&'static Case, u32)> {
    let fits = queue.iter().position(|(case, _)| case.kind == kind);
    queue.remove(fits.unwrap_or(0))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}
