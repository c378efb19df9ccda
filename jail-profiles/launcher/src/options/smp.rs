//! `-smp`: what is left out is computed as QEMU 5.1 does it, sockets before cores before threads.

use bulkhead_control_api::config::CpuTopology;

use crate::cli::{Params, Problem};

/// Bound on every number, so that products do not overflow.
const MAX_FIELD: u64 = 4096;

/// vCPUs and their topology.
pub fn topology(params: &Params) -> Result<CpuTopology, Problem> {
    let field = |name: &'static str| match params.number(name) {
        Some(number) if number > MAX_FIELD => Err(Problem::OutOfRange(name, number.to_string())),
        number => Ok(number.unwrap_or(0)),
    };
    let or_one = |number: u64| number.max(1);
    if params.number("dies").is_some_and(|dies| dies != 1) {
        return Err(Problem::Dies);
    }
    let (mut cpus, maxcpus) = (field("cpus")?, field("maxcpus")?);
    let (mut sockets, mut cores, mut threads) = (field("sockets")?, field("cores")?, field("threads")?);
    if cpus == 0 {
        (sockets, cores, threads) = (or_one(sockets), or_one(cores), or_one(threads));
        cpus = sockets * cores * threads;
    } else if sockets == 0 {
        (cores, threads) = (or_one(cores), or_one(threads));
        let places = if maxcpus == 0 { cpus } else { maxcpus };
        sockets = or_one(places / (cores * threads));
    } else if cores == 0 {
        threads = or_one(threads);
        cores = or_one(cpus / (sockets * threads));
    } else if threads == 0 {
        threads = or_one(cpus / (cores * sockets));
    }
    let maxcpus = if maxcpus == 0 { cpus } else { maxcpus };
    if maxcpus < cpus {
        return Err(Problem::MaxcpusBelowCpus);
    }
    if maxcpus > u64::from(CpuTopology::MAX_CPUS) {
        return Err(Problem::TooManyCpus(maxcpus, CpuTopology::MAX_CPUS));
    }
    if sockets * cores * threads != maxcpus {
        return Err(Problem::Topology(sockets, cores, threads, maxcpus));
    }
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    Ok(CpuTopology {
        cpus: narrow(cpus),
        sockets: narrow(sockets),
        cores: narrow(cores),
        threads: narrow(threads),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Takes, table};

    fn parse(text: &str) -> Result<[u32; 4], String> {
        let Takes::Params(group) = table::find("smp").unwrap().takes else { panic!("-smp") };
        let topology = Params::parse(group, text).and_then(|params| topology(&params));
        topology.map(|t| [t.cpus, t.sockets, t.cores, t.threads]).map_err(|e| e.to_string())
    }

    #[test]
    fn missing_numbers_are_computed() {
        for (text, topology) in [
            ("", [1, 1, 1, 1]),
            ("4", [4, 4, 1, 1]),
            ("0", [1, 1, 1, 1]),
            ("4,cores=2", [4, 2, 2, 1]),
            ("4,threads=2", [4, 2, 1, 2]),
            ("4,sockets=1", [4, 1, 4, 1]),
            ("4,sockets=1,threads=2", [4, 1, 2, 2]),
            ("8,sockets=2,cores=2", [8, 2, 2, 2]),
            ("sockets=2,cores=3,threads=2,dies=1", [12, 2, 3, 2]),
            ("2,maxcpus=8", [2, 8, 1, 1]),
            ("2,maxcpus=8,cores=2,threads=2", [2, 2, 2, 2]),
            ("64", [64, 64, 1, 1]),
        ] {
            assert_eq!(parse(text), Ok(topology), "{text}");
        }
    }

    #[test]
    fn refused() {
        let product = "Invalid CPU topology: product of the hierarchy must match maxcpus: ";
        for (text, error) in [
            ("x", "Parameter 'cpus' expects a number".to_owned()),
            ("2,dies=2", "dies not supported by this machine's CPU topology".to_owned()),
            ("2,dies=0", "dies not supported by this machine's CPU topology".to_owned()),
            ("4,maxcpus=2", "maxcpus must be equal to or greater than smp".to_owned()),
            ("65", "Invalid SMP CPUs 65. The max CPUs supported by machine 'bulkhead' is 64".to_owned()),
            (
                "1,maxcpus=65",
                "Invalid SMP CPUs 65. The max CPUs supported by machine 'bulkhead' is 64".to_owned(),
            ),
            ("5000", "Value '5000' is out of range for parameter 'cpus'".to_owned()),
            ("4,sockets=3", format!("{product}sockets (3) * cores (1) * threads (1) != maxcpus (4)")),
            (
                "2,sockets=1,cores=1,threads=1",
                format!("{product}sockets (1) * cores (1) * threads (1) != maxcpus (2)"),
            ),
            ("3,cores=2", format!("{product}sockets (1) * cores (2) * threads (1) != maxcpus (3)")),
        ] {
            assert_eq!(parse(text).unwrap_err(), error, "{text}");
        }
    }
}
