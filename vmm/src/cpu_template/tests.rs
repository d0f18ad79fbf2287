use super::*;

fn cpuid(leaves: &[(u32, u32, [u32; 4])]) -> CpuId {
    let entries: Vec<_> = leaves
        .iter()
        .map(|(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function: *function,
            index: *index,
            eax: *eax,
            ebx: *ebx,
            ecx: *ecx,
            edx: *edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).unwrap()
}

fn read(cpuid: &CpuId, leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut entries = cpuid.as_slice().iter();
    let found = entries.find(|e| (e.function, e.index) == (leaf, subleaf));
    let entry = found.expect("the leaf");
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

const ALL: [u32; 4] = [u32::MAX; 4];
const AMD: (u32, u32, [u32; 4]) = (0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
const INTEL: (u32, u32, [u32; 4]) = (0, 0, [0x10, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);

fn custom(json: &str) -> Template {
    Template {
        masks: serde_json::from_str(json).unwrap(),
        lenient: false,
    }
}

#[test]
fn bitmaps_set_clear_and_leave() {
    let template = custom(
        r#"{"cpuid_modifiers":[{"leaf":"0x7","subleaf":"0x0","flags":1,"modifiers":[
            {"register":"ebx","bitmap":"0b01x"},{"register":"edx","bitmap":"0b0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]}],
            "msr_modifiers":[{"addr":"0x10a","bitmap":"0b10x"}]}"#,
    );
    let host = cpuid(&[INTEL, (7, 0, ALL), (7, 1, ALL)]);
    let guest = template.apply(&host).unwrap();
    assert_eq!(
        read(&guest, 7, 0),
        [u32::MAX, 0xffff_fffb, u32::MAX, 0x7fff_ffff]
    );
    assert_eq!(read(&guest, 7, 1), ALL, "another subleaf");
    let [change] = template.msr_changes().try_into().unwrap();
    assert_eq!(
        (change.index, change.mask, change.value),
        (0x10a, 0b110, 0b100)
    );
}

#[test]
fn refuses_what_is_not_there_by_name() {
    let host = cpuid(&[INTEL, (7, 0, ALL)]);
    let modifiers = |leaf: &str, flags: u32| {
        custom(&format!(
            r#"{{"cpuid_modifiers":[{{"leaf":"{leaf}","subleaf":"0x5","flags":{flags},"modifiers":[]}}]}}"#
        ))
    };
    let error = modifiers("0x7", 1).apply(&host).unwrap_err().to_string();
    assert!(error.contains("leaf 0x7, subleaf 0x5"), "{error}");
    let error = modifiers("0x7", 8).apply(&host).unwrap_err().to_string();
    assert!(error.contains("`flags` 0x8"), "{error}");
}

#[test]
fn named_ones_are_for_their_vendors_cpus() {
    use NamedCpuTemplate::{C3, T2, T2A, T2CL, T2S};
    for (name, wanted) in [
        (C3, INTEL),
        (T2, INTEL),
        (T2S, INTEL),
        (T2CL, INTEL),
        (T2A, AMD),
    ] {
        for host in [INTEL, AMD] {
            let result = Template::named(name, &cpuid(&[host]));
            assert_eq!(result.is_ok(), host == wanted, "{name:?}");
            if let Err(error) = result {
                let error = error.to_string();
                assert!(
                    error.contains("Genuine") && error.contains("Authentic"),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn named_ones_hide_and_never_add() {
    use NamedCpuTemplate::{C3, T2, T2A, T2CL, T2S};
    for (name, vendor) in [
        (C3, INTEL),
        (T2, INTEL),
        (T2S, INTEL),
        (T2CL, INTEL),
        (T2A, AMD),
    ] {
        // A host that has nothing gets nothing, but for another name of its CPU.
        let leaves = [1, 7, 0xd, 0x8000_0001, 0x8000_0008];
        let mut bare = vec![vendor];
        let mut full = vec![vendor];
        for leaf in leaves {
            bare.push((leaf, 0, [0; 4]));
            full.push((leaf, 0, ALL));
        }
        let bare = cpuid(&bare);
        let template = Template::named(name, &bare).unwrap();
        let guest = template.apply(&bare).unwrap();
        for leaf in leaves {
            let [eax, rest @ ..] = read(&guest, leaf, 0);
            assert!(eax == 0 || leaf == 1, "{name:?}");
            assert_eq!(rest, [0; 3], "{name:?} leaf {leaf:#x}");
        }
        let guest = template.apply(&cpuid(&full)).unwrap();
        let [_, ebx, ecx, edx] = read(&guest, 7, 0);
        assert_eq!(ebx & 1 << 16, 0, "AVX-512F");
        assert_eq!(ecx & 1 << 16, 0, "LA57");
        let kept = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31;
        assert_eq!(edx & kept, kept, "what protects a guest stays: {name:?}");
        assert_eq!(ebx & 1 << 5 != 0, name != C3, "AVX2: {name:?}");
        assert_eq!(read(&guest, 0xd, 0)[0], 7);
    }
}

/// What a guest in ring 0 reads on this host: leaf 7.0, leaf 1 and IA32_MISC_ENABLE.
mod guest {
    use std::fs::OpenOptions;
    use std::sync::Mutex;

    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::boot::{EntryState, KaslrOutcome, Protocol};
    use crate::kvm::cpuid::MachineCpuid;
    use crate::kvm::{Access, Exit};
    use crate::memory;

    const CODE: u64 = 0x10_0000;

    #[derive(Default)]
    struct Ports(Mutex<Vec<u32>>);

    impl Access for Ports {
        fn port_read(&self, _: u16, _: &mut [u8]) {}
        fn port_write(&self, _: u16, data: &[u8]) {
            let value = u32::from_le_bytes(data.try_into().unwrap());
            self.0.lock().unwrap().push(value);
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }

    /// `mov eax, leaf; mov ecx, 0; cpuid`, then each register to port 0x10.
    fn cpuid_code(leaf: u32) -> Vec<u8> {
        let mut code = vec![0xb8];
        code.extend(leaf.to_le_bytes());
        code.extend([0xb9, 0, 0, 0, 0, 0x0f, 0xa2, 0xe7, 0x10]);
        for to_eax in [0xd8, 0xc8, 0xd0] {
            code.extend([0x89, to_eax, 0xe7, 0x10]);
        }
        code
    }

    fn run(template: &Template) -> Result<Vec<u32>, Error> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let mut vm = Vm::new(device.expect("these tests need /dev/kvm"))?;
        let memory = memory::allocate(2 << 20).unwrap();
        vm.set_memory(&memory, 36)?;
        vm.create_irqchip(false)?;
        let supported = template.apply(&vm.supported_cpuid()?)?;
        let cpuid = MachineCpuid::new(&supported, 1, vm.has_tsc_deadline());
        let mut vcpu = vm.create_vcpus(1)?.pop().unwrap();
        vcpu.set_features(&cpuid.of_vcpu(0)?)?;
        vcpu.change_msrs(&template.msr_changes())?;
        let mut code = cpuid_code(7);
        code.extend(cpuid_code(1));
        // mov ecx, IA32_MISC_ENABLE; rdmsr; out 0x10, eax; hlt
        code.extend([0xb9, 0xa0, 0x01, 0, 0, 0x0f, 0x32, 0xe7, 0x10, 0xf4]);
        memory.write_slice(&code, GuestAddress(CODE)).unwrap();
        vcpu.set_entry(&EntryState {
            protocol: Protocol::Pvh,
            rip: CODE,
            rsi: 0,
            rbx: 0,
            kaslr: KaslrOutcome::NotWithPvh,
        })?;
        let ports = Ports::default();
        while ports.0.lock().unwrap().len() < 9 {
            match vcpu.run(&ports) {
                Exit::Served | Exit::Kicked => {}
                exit => panic!("{exit:?}"),
            }
        }
        Ok(ports.0.into_inner().unwrap())
    }

    #[test]
    fn sees_the_template() {
        let plain = run(&Template::default()).unwrap();
        // What user mode sees cannot be hidden where KVM pages in software, so these are ring 0's: CX16
        // and x2APIC.
        let hidden = 1 << 13 | 1 << 21;
        assert_eq!(plain[6] & hidden, hidden);
        let template = custom(
            r#"{"cpuid_modifiers":[
                {"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[
                    {"register":"eax","bitmap":"0bxxxx_0000_0000_0011_xx00_0110_1111_0010"},
                    {"register":"ecx","bitmap":"0b00xx_xxxx_xx0x_xxxx_xx0x_xxxx_xxxx_xxxx"}]}],
                "msr_modifiers":[{"addr":"0x1a0","bitmap":"0b1xxxxxxxxxxxx0"}]}"#,
        );
        let changed = run(&template).unwrap();
        assert_eq!(changed[4] & 0x0fff_3fff, 0x306f2);
        assert_eq!(changed[6] & 1 << 31, 1 << 31, "the hypervisor bit stays");
        assert_eq!(changed[6] & hidden, 0);
        assert_eq!(changed[..4], plain[..4], "another leaf");
        assert_eq!(plain[8] & 1, 1);
        assert_eq!(changed[8] & 1, 0, "fast strings, by MSR");
    }

    #[test]
    fn a_register_that_kvm_refuses_is_named() {
        let template = custom(r#"{"msr_modifiers":[{"addr":"0xdead","bitmap":"0b1"}]}"#);
        let error = run(&template).unwrap_err().to_string();
        assert!(error.contains("0xdead cannot be"), "{error}");
    }

    #[test]
    fn a_capability_that_kvm_lacks_is_named() {
        let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let vm = Vm::new(device.expect("these tests need /dev/kvm")).unwrap();
        let text = |capabilities: &str| {
            format!(
                r#"{{"boot-source":{{"kernel_image_path":"/k"}},"machine-config":{{"vcpu_count":1,"mem_size_mib":1}},
                "cpu-config":{{"kvm_capabilities":[{capabilities}]}}}}"#
            )
        };
        let supported = vm.supported_cpuid().unwrap();
        let of = |capabilities: &str| {
            let config = Config::from_json(text(capabilities).as_bytes()).unwrap();
            Template::of(&config, &vm, &supported)
        };
        // KVM_CAP_IRQCHIP; and one that will not be for long.
        of(r#""0","!171""#).unwrap();
        let error = of(r#""60000""#).unwrap_err().to_string();
        assert!(error.contains("60000"), "{error}");
    }
}
