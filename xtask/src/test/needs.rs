//! Which of the tests beside the code need what a host may not have.

/// Test programs, and how the names of those of their tests begin that enter a VM or build a jail: these need
/// `/dev/kvm`, Landlock and cgroups.
const KVM: [(&str, &str); 3] = [
    ("casemate_vmm", "vcpu::tests::"),
    ("casemate_jailer", "landlock::tests::a_broker_"),
    ("jail", ""),
];

/// Whether `test` of the test program `program` needs KVM.
pub fn kvm(program: &str, test: &str) -> bool {
    KVM.iter()
        .any(|(name, prefix)| *name == program && test.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_is_known_by_its_program_and_its_module() {
        assert!(kvm("jail", "a_jail_without_a_broker"));
        assert!(kvm("casemate_vmm", "vcpu::tests::port_writes"));
        assert!(!kvm("casemate_vmm", "config::tests::empty"));
        assert!(!kvm("casemate", "vcpu::tests::port_writes"));
    }
}
