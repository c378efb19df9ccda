//! CPUID of each vCPU: what this host's KVM supports, with the guest's own topology.
//!
//! Leaves by Intel SDM vol. 2A (CPUID) and AMD APM vol. 3 appendix E.

use bulkhead_control_api::config::{CpuPlace, CpuTopology};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{Error, Result, kvm};

/// Vendors whose topology is in the leaves 0x8000_0008, 0x8000_001d and 0x8000_001e.
const AMD_VENDORS: [&[u8; 12]; 2] = [b"AuthenticAMD", b"HygonGenuine"];
/// Highest basic leaf that the topology needs.
const LEAF_TOPOLOGY: u32 = 0xb;
/// A guest gets no virtualization of its own: KVM's nested code is the largest surface that a tenant
/// could reach. VMX is this bit of leaf 1 ECX ...
const VMX: u32 = 5;
/// ... SVM this bit of leaf 0x80000001 ECX ...
const SVM: u32 = 2;
/// ... and the leaf that describes SVM.
const LEAF_SVM: u32 = 0x8000_000a;
/// AMD's own form.
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;
/// The same information in its second form (Intel).
const LEAF_TOPOLOGY_V2: u32 = 0x1f;

/// CPUID without what differs from vCPU to vCPU.
#[derive(Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    topology: CpuTopology,
    amd: bool,
}

/// Replaces `bits` bits of `word` from bit `at`.
fn set_bits(word: &mut u32, at: u32, bits: u32, value: u32) {
    let mask = ((1u32 << bits) - 1) << at;
    *word = *word & !mask | value << at & mask;
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Option<Vec<u8>> {
    let leaf = entries.iter().find(|e| e.function == 0)?;
    Some([leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat())
}

impl Template {
    /// What KVM supports, with room for the guest's topology.
    pub fn new(host: &Kvm, topology: CpuTopology) -> Result<Self> {
        let supported =
            host.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = host.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_entries(supported.as_slice(), topology, deadline))
    }

    fn from_entries(supported: &[kvm_cpuid_entry2], topology: CpuTopology, deadline: bool) -> Self {
        let amd = vendor(supported).is_some_and(|v| AMD_VENDORS.iter().any(|amd| v == *amd));
        let topology_leaf = |e: &kvm_cpuid_entry2| matches!(e.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2);
        let left_out = |e: &kvm_cpuid_entry2| topology_leaf(e) || e.function == LEAF_SVM;
        let mut entries: Vec<_> = supported.iter().filter(|e| !left_out(e)).copied().collect();
        let mut max_leaf = 0;
        for entry in &mut entries {
            match entry.function {
                0 => {
                    entry.eax = entry.eax.max(LEAF_TOPOLOGY);
                    max_leaf = entry.eax;
                }
                1 => {
                    // x2APIC and hypervisor; the TSC deadline timer lives in KVM's local APIC.
                    entry.ecx |= 1 << 21 | 1 << 31;
                    set_bits(&mut entry.ecx, VMX, 1, 0);
                    set_bits(&mut entry.ecx, 24, 1, u32::from(deadline));
                }
                0x8000_0000 if amd => entry.eax = entry.eax.max(LEAF_TOPOLOGY_AMD),
                // TopologyExtensions: without it Linux looks at none of the topology leaves.
                0x8000_0001 if amd => {
                    entry.ecx |= 1 << 22;
                    set_bits(&mut entry.ecx, SVM, 1, 0);
                }
                _ => {}
            }
        }
        if amd && !entries.iter().any(|e| e.function == LEAF_TOPOLOGY_AMD) {
            entries.push(kvm_cpuid_entry2 { function: LEAF_TOPOLOGY_AMD, ..Default::default() });
        }
        let forms = if max_leaf >= LEAF_TOPOLOGY_V2 && !amd { 2 } else { 1 };
        for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().take(forms) {
            for index in 0..3 {
                let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
                entries.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
            }
        }
        Self { entries, topology, amd }
    }

    /// Physical address bits of the guest.
    pub fn physical_bits(&self) -> u32 {
        self.entries.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax & 0xff)
    }

    /// CPUID of the vCPU at `place`.
    pub fn at(&self, place: CpuPlace) -> Result<CpuId> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            self.place_common(entry, place);
            if self.amd {
                self.place_amd(entry, place);
            }
        }
        CpuId::from_entries(&entries).map_err(|_| Error::Capability("room for all CPUID leaves"))
    }

    /// Logical processors of a package, as ids that the APIC id's fields can name.
    fn package_ids(&self) -> u32 {
        1 << self.topology.core_bits()
    }

    fn thread_ids(&self) -> u32 {
        1 << self.topology.thread_bits()
    }

    /// Number of vCPUs in a package.
    fn package_threads(&self) -> u32 {
        self.topology.cores.max(1) * self.topology.threads.max(1)
    }

    fn place_common(&self, entry: &mut kvm_cpuid_entry2, place: CpuPlace) {
        let multi = self.package_threads() > 1;
        match entry.function {
            1 => {
                set_bits(&mut entry.ebx, 24, 8, place.apic_id);
                set_bits(&mut entry.ebx, 16, 8, if multi { self.package_ids() } else { 1 });
                // HTT: the package has more than one logical processor.
                set_bits(&mut entry.edx, 28, 1, u32::from(multi));
            }
            // A cache of type 0 ends the list.
            4 if entry.eax & 0x1f != 0 => {
                set_bits(&mut entry.eax, 26, 6, self.package_ids() / self.thread_ids() - 1);
                self.share_cache(&mut entry.eax);
            }
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
                // Kinds of levels: 1 is threads, 2 is cores, 0 ends the list.
                let (bits, count, kind) = match entry.index {
                    0 => (self.topology.thread_bits(), self.topology.threads.max(1), 1),
                    1 => (self.topology.core_bits(), self.package_threads(), 2),
                    _ => (0, 0, 0),
                };
                (entry.eax, entry.ebx) = (bits, count);
                (entry.ecx, entry.edx) = (entry.index | kind << 8, place.apic_id);
            }
            _ => {}
        }
    }

    /// First and second level caches belong to a core, the others to the package.
    fn share_cache(&self, eax: &mut u32) {
        let level = *eax >> 5 & 7;
        let sharing = if level < 3 { self.thread_ids() } else { self.package_ids() };
        set_bits(eax, 14, 12, sharing - 1);
    }

    fn place_amd(&self, entry: &mut kvm_cpuid_entry2, place: CpuPlace) {
        match entry.function {
            // CmpLegacy.
            0x8000_0001 => set_bits(&mut entry.ecx, 1, 1, u32::from(self.package_threads() > 1)),
            0x8000_0008 => {
                set_bits(&mut entry.ecx, 0, 8, self.package_threads() - 1);
                set_bits(&mut entry.ecx, 12, 4, self.topology.core_bits());
            }
            0x8000_001d if entry.eax & 0x1f != 0 => self.share_cache(&mut entry.eax),
            LEAF_TOPOLOGY_AMD => {
                entry.eax = place.apic_id;
                entry.ebx = place.core | (self.topology.threads.max(1) - 1) << 8;
                entry.ecx = place.socket;
                entry.edx = 0;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPOLOGY: CpuTopology = CpuTopology { cpus: 12, sockets: 2, cores: 3, threads: 2 };

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    fn host(name: [u8; 12]) -> Vec<kvm_cpuid_entry2> {
        let word = |i: usize| u32::from_le_bytes(name[i..i + 4].try_into().unwrap());
        let zero = kvm_cpuid_entry2 { eax: 0xd, ebx: word(0), edx: word(4), ecx: word(8), ..entry(0, 0) };
        let cache = |index, level: u32| kvm_cpuid_entry2 { eax: 1 | level << 5, ..entry(4, index) };
        let amd_cache = kvm_cpuid_entry2 { eax: 1 | 3 << 5, ..entry(0x8000_001d, 0) };
        let mut list =
            vec![zero, entry(1, 0), cache(0, 1), cache(1, 3), entry(4, 2), entry(0xb, 0), amd_cache];
        list.extend([0x8000_0000, 0x8000_0001, 0x8000_0008].map(|f| entry(f, 0)));
        list
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let all: Vec<_> =
            cpuid.as_slice().iter().filter(|e| (e.function, e.index) == (function, index)).collect();
        assert_eq!(all.len(), 1, "leaf {function:#x}.{index}");
        *all[0]
    }

    #[test]
    fn topology_leaves_agree_with_the_apic_id() {
        let template = Template::from_entries(&host(*b"GenuineIntel"), TOPOLOGY, true);
        let cpuid = template.at(TOPOLOGY.place(11)).unwrap();
        // Socket 1, core 2, thread 1: 1 << 3 | 2 << 1 | 1.
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16, 13 << 8 | 8);
        assert_eq!(find(&cpuid, 1, 0).ecx, 1 << 21 | 1 << 24 | 1 << 31);
        assert_eq!(find(&cpuid, 1, 0).edx, 1 << 28);
        let smt = find(&cpuid, 0xb, 0);
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, 13));
        let core = find(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 13));
        assert_eq!(find(&cpuid, 0xb, 2).ecx, 2);
        assert_eq!(find(&cpuid, 4, 0).eax, 3 << 26 | 1 << 14 | 1 << 5 | 1);
        assert_eq!(find(&cpuid, 4, 1).eax, 3 << 26 | 7 << 14 | 3 << 5 | 1);
        assert_eq!(find(&cpuid, 4, 2).eax, 0);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn amd_leaves_are_set_for_amd_only() {
        let template = Template::from_entries(&host(*b"AuthenticAMD"), TOPOLOGY, false);
        let cpuid = template.at(TOPOLOGY.place(5)).unwrap();
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(find(&cpuid, 0x8000_001d, 0).eax, 7 << 14 | 3 << 5 | 1);
        let node = find(&cpuid, 0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx), (5, 1 << 8 | 2, 0));
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, 1 << 1 | 1 << 22);
        assert_eq!(find(&cpuid, 0x8000_0000, 0).eax, 0x8000_001e);
        assert_eq!(find(&cpuid, 1, 0).ecx & 1 << 24, 0);
    }

    #[test]
    fn guests_get_no_virtualization_of_their_own() {
        let all = |function| kvm_cpuid_entry2 { function, ecx: u32::MAX, ..Default::default() };
        let name = |n: &[u8; 4]| u32::from_le_bytes(*n);
        let vendor = kvm_cpuid_entry2 {
            eax: 1,
            ebx: name(b"Auth"),
            edx: name(b"enti"),
            ecx: name(b"cAMD"),
            ..Default::default()
        };
        let supported = [vendor, all(1), all(0x8000_0001), all(LEAF_SVM)];
        let topology = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };
        let cpuid = Template::from_entries(&supported, topology, true);
        let ecx = |function| cpuid.entries.iter().find(|e| e.function == function).map(|e| e.ecx);
        assert_eq!(ecx(1).map(|w| w >> VMX & 1), Some(0));
        assert_eq!(ecx(0x8000_0001).map(|w| w >> SVM & 1), Some(0));
        assert_eq!(ecx(LEAF_SVM), None);
    }

    #[test]
    fn a_single_vcpu_is_no_multiprocessor() {
        let topology = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };
        let cpuid =
            Template::from_entries(&host(*b"GenuineIntel"), topology, true).at(topology.place(0)).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16, 1);
        assert_eq!(find(&cpuid, 1, 0).edx & 1 << 28, 0);
        assert_eq!(find(&cpuid, 0xb, 0).eax, 0);
    }
}
