"""Drives Casemate's VMM with the SDK `firecracker-python`, as it comes from PyPI.

Run as root in a network and a mount namespace of its own (`ip netns exec`), whose default route leaves by an
interface: what the SDK makes in `/var/lib/firecracker`, `/etc`, nftables and among the interfaces is gone with
them. Prints a transcript; ends with an exception where the SDK or the VMM did not do what they should.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import stand_ins

# The longest that anything may take, in seconds.
PATIENCE = 60


def overlay(place, scratch):
    """Lets files be made in `place` that only this mount namespace sees."""
    layer = scratch / place.strip("/").replace("/", "-")
    upper, work = layer / "upper", layer / "work"
    upper.mkdir(parents=True)
    work.mkdir()
    options = f"lowerdir={place},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, place], check=True)


def prepare(vmm, scratch):
    """Puts the VMM where the SDK looks for Firecracker, and stand-ins where it looks for services."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", scratch], check=True)
    for place in ["/etc", "/usr/local/bin", "/var/lib"]:
        overlay(place, scratch)
    Path("/var/lib/firecracker").mkdir(exist_ok=True)
    # By a mount, not a copy: the process is called as the file that was executed.
    Path("/usr/local/bin/firecracker").touch()
    subprocess.run(["mount", "--bind", vmm, "/usr/local/bin/firecracker"], check=True)
    Path("/etc/hosts").write_text(f"127.0.0.1 localhost {stand_ins.ADDRESS_SERVICE}\n")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    stand_ins.docker_engine()
    certificate = stand_ins.address_service(scratch)
    host, port = stand_ins.DOCKER
    os.environ.update(DOCKER_HOST=f"tcp://{host}:{port}", REQUESTS_CA_BUNDLE=str(certificate))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]


class Transcript:
    """Says what is called and what came of it."""

    def __init__(self, **names):
        self.names = names

    def __call__(self, text):
        print(f">>> {text}", flush=True)
        value = eval(text, self.names)
        shown = json.dumps(value) if isinstance(value, (dict, list)) else value
        if shown is not None:
            print(shown, flush=True)
        return value

    def insist(self, text):
        """The same of a call that the VMM gives up after two seconds, as a host that is overloaded lets it."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self(text)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                if "the machine runs on" not in str(error) or time.monotonic() > end:
                    raise

    def refused(self, text, words):
        """The call must fail, in words that contain `words`."""
        try:
            self(text)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            assert words in str(error), error
        else:
            raise AssertionError(f"{text} was not refused")


def ticks(output):
    """How often the guest has said that it runs."""
    return len(re.findall("^probe: tick ", output.read_text(), re.MULTILINE))


def wait_for(what, holds):
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE} s"
        time.sleep(0.02)


def drive(kernel, disk):
    """Configures, starts, pauses, inspects, saves and stops a machine."""
    # Only now: the SDK reads its environment when it is imported.
    from firecracker import MicroVM

    call = Transcript(MicroVM=MicroVM, kernel=kernel, disk=disk)
    vm = call(
        "MicroVM(name='casemate', kernel_file=kernel, base_rootfs=disk, vcpu=2, memory='256M', "
        "init_file='/init probe.task=tick', labels={'tier': 'test'}, "
        "mmds_enabled=True, user_data='#cloud-config', vsock_enabled=True, vsock_guest_cid=7)"
    )
    call.names["vm"] = vm
    created = call("vm.create()")
    assert re.fullmatch(r"VMM \w{8} created", created), created
    machine = created.split()[1]
    call.names["id"] = machine
    place = Path("/var/lib/firecracker") / machine
    output = place / "firecracker.log"
    wait_for("the guest runs", lambda: ticks(output) > 2)

    # What it was told is what the VMM shows.
    config = call("vm.config()")
    assert config["machine-config"]["vcpu_count"] == 2
    assert config["machine-config"]["mem_size_mib"] == 256
    assert config["boot-source"]["kernel_image_path"] == kernel
    assert config["drives"][0]["path_on_host"] == str(place / "rootfs" / Path(disk).name)
    assert config["network-interfaces"][0]["host_dev_name"] == f"tap_{machine}"
    assert config["mmds-config"]["version"] == "V2"
    assert config["vsock"]["guest_cid"] == 7
    described = call("vm._api.describe.get().json()")
    assert (described["id"], described["state"]) == (machine, "Running")
    assert described["app_name"] == "Firecracker"
    assert re.fullmatch(r"\d+\.\d+\.\d+", call("vm._api.version.get().json()")["firecracker_version"])
    assert call("vm._api.machine_config.get().json()")["vcpu_count"] == 2
    metadata = call("vm._api.mmds.get().json()")
    assert metadata["latest"]["user-data"] == "#cloud-config"
    call("vm._api.mmds.patch(latest={'user-data': 'changed'}).status_code")
    assert call("vm._api.mmds.get().json()")["latest"]["user-data"] == "changed"

    # What the SDK knows of it.
    inspected = call("vm.inspect()")
    pid = inspected["State"]["Pid"]
    assert Path(f"/proc/{pid}/comm").read_text() == "firecracker\n"
    assert "is running" in call("vm.status()")
    assert [found["id"] for found in call("MicroVM.list()")] == [machine]
    assert [found["id"] for found in call("vm.find(state='Running', labels={'tier': 'test'})")] == [machine]

    # A paused guest says nothing, a resumed one goes on.
    call.insist("vm.pause()")
    assert call("vm._vmm.get_vmm_state(id)") == "Paused"
    before = ticks(output)
    time.sleep(0.5)
    assert ticks(output) == before, "the guest ran while it was paused"
    call("vm.resume()")
    assert call("vm._vmm.get_vmm_state(id)") == "Running"
    wait_for("the guest runs again", lambda: ticks(output) > before)

    # A snapshot, after which it goes on.
    state, memory = (Path("/var/lib/firecracker") / name for name in ("state", "memory"))
    call.names.update(state=str(state), memory=str(memory))
    before = ticks(output)
    call("vm.snapshot(action='create', memory_path=memory, snapshot_path=state)")
    assert state.stat().st_size > 0 and memory.stat().st_size == (256 << 20) + 4096
    assert call("vm._vmm.get_vmm_state(id)") == "Running"
    wait_for("the guest goes on", lambda: ticks(output) > before)

    # What cannot be done is refused in words that the SDK hands on, and changes nothing.
    call.refused("vm._api.boot.put(kernel_image_path=kernel)", "only before the machine is started")
    call.refused("vm._api.vm.patch(state='Stopped')", "API fault: ")
    call.refused("vm._api.logger.put(no_such_field=1)", "no_such_field")
    call.refused("vm._api.drive.patch(drive_id='rootfs', path_on_host='/no/such/file')", "/no/such/file")

    # Somebody has to collect the child, or the SDK waits for it in vain.
    ends = []
    collector = threading.Thread(target=lambda: ends.append(os.waitpid(pid, 0)[1]))
    collector.start()
    assert "is deleted" in call("vm.delete()")
    collector.join(PATIENCE)
    code = os.waitstatus_to_exitcode(ends[0])
    print(f"the VMM ended with exit code {code}")
    # By SIGTERM: the SDK waits one second, then it would have killed the VMM.
    assert code == 12, "ended by the host"
    assert call("MicroVM.list()") == []
    assert not place.exists() and not Path(f"/sys/class/net/tap_{machine}").exists()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vmm", required=True, help="the program casemate-vmm")
    parser.add_argument("--kernel", required=True, help="the program casemate-probe")
    parser.add_argument("--disk", required=True, help="an image for the guest's root drive")
    parser.add_argument("--scratch", required=True, type=Path, help="an empty directory")
    arguments = parser.parse_args()
    prepare(arguments.vmm, arguments.scratch)
    drive(arguments.kernel, arguments.disk)
    print("sdk ok")


if __name__ == "__main__":
    sys.exit(main())
