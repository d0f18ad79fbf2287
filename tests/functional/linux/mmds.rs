//! The metadata service under Linux, in each version on the transport where `every_device` has the other one.

use casemate_tests::{Netns, Running};
use serde_json::json;

use crate::guest::{Guest, linux};

/// What a guest finds without a token, and with one.
const SCRIPT: &str = "
ip link set eth0 up; ip address add 10.99.0.2/24 dev eth0; ip route add 169.254.169.254 dev eth0
url=http://169.254.169.254/latest/name
echo \"without: $(wget -q -O - $url 2>&1)\"
token=$(printf 'PUT /latest/api/token HTTP/1.1\\r\\nX-metadata-token-ttl-seconds: 60\\r\\n\\r\\n' | nc -w 5 169.254.169.254 80 | tail -n 1)
echo \"with: $(wget -q -O - --header \"X-metadata-token: $token\" $url 2>&1)\"
echo \"as JSON: $(wget -q -O - --header \"X-metadata-token: $token\" --header 'Accept: application/json' $url 2>&1)\"
echo \"by a proxy: $(wget -q -O - --header \"X-metadata-token: $token\" --header 'X-Forwarded-For: 10.1.1.1' $url 2>&1)\"
poweroff -f
";

fn found(version: &str, imds_compat: bool, pci: bool) -> [String; 4] {
    let netns = Netns::with_tap(None);
    let drivers = ["virtio_net", "virtio_mmio", "virtio_pci"];
    let script = format!("exec > /dev/console 2>&1\n{SCRIPT}");
    let mut vm = linux("", &drivers, &script, &[])
        .net("tap0", "06:00:ac:10:00:02")
        .set(
            "/mmds-config",
            json!({ "version": version, "imds_compat": imds_compat, "network_interfaces": ["eth0"] }),
        )
        .jailer_arg("--netns")
        .jailer_arg(&netns.path())
        .served();
    if pci {
        vm = vm.pci();
    }
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let mut guest = Guest::new(running, vm);
    let data = json!({ "latest": { "name": "keep" } });
    guest.ask("PUT", "/mmds", &data).assert_done();
    let said = ["without: ", "with: ", "as JSON: ", "by a proxy: "].map(|words| guest.says(words));
    guest.vm.wait().unwrap();
    said.map(|line| line.trim_end().to_owned())
}

#[test]
fn version_1_on_pci_answers_with_and_without_a_token() {
    let [without, with, json, proxy] = found("V1", false, true);
    assert_eq!([without, with], ["without: keep", "with: keep"]);
    assert_eq!(json, "as JSON: \"keep\"");
    assert!(proxy.contains("400"), "{proxy}");
}

#[test]
fn version_2_on_mmio_answers_with_a_token_only() {
    let [without, with, json, proxy] = found("V2", true, false);
    assert!(without.contains("401"), "{without}");
    assert_eq!(with, "with: keep");
    // As the clouds' services, which answer in text whatever is accepted.
    assert_eq!(json, "as JSON: keep");
    assert!(proxy.contains("400"), "{proxy}");
}
