"""Holds the VMM to `docs/openapi.yaml`: does every operation of it, and checks each answer by it.

After the start, first the document's own examples: they configure and start the machine, and each has to be done when
its `x-when` says so. Then, and before the start only, schemathesis: its names and bodies are made from the document's
schemas, some that fit them and some that do not, which have to be refused. Two runs send the same requests.
"""

import argparse
import itertools
import sys
from collections import Counter, defaultdict

import requests
import schemathesis
from schemathesis.cli import schemathesis as command_line

from forwarder import forward

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
]
# What the walk through the examples excuses from being done, before and after the start on each transport, and words of
# the reason that the machine has to give. What is done nevertheless is excused by mistake.
NO_BUS = "on a PCI bus only"
EXCUSED = {
    "before": {"PUT /snapshot/load": "has been configured already"},
    "after": {
        "PUT /snapshot/create": "a machine that is paused",
        "PUT /migration/cancel": "no machine is being moved",
        "PATCH /balloon/hinting/start": "no driver",
        "PATCH /balloon/hinting/stop": "no driver",
        "DELETE /drives/{drive_id}": "is the root device",
    },
}
EXCUSED_ON = {
    "mmio": {
        "PUT /drives/{drive_id}": NO_BUS,
        "PUT /pmem/{id}": NO_BUS,
        "PUT /network-interfaces/{iface_id}": NO_BUS,
        "PUT /vsock": NO_BUS,
        "DELETE /pmem/{id}": NO_BUS,
        "DELETE /network-interfaces/{iface_id}": NO_BUS,
        "DELETE /vsock": NO_BUS,
    },
    "pci": {
        "PUT /drives/{drive_id}": "there is a drive root already",
        "PUT /network-interfaces/{iface_id}": "there is a network interface eth0 already",
    },
}
# On PCI these come after the start.
PLUGGED = ["PUT /pmem/{id}", "PUT /vsock"]
START = "PUT /actions"


class Book:
    """What was asked, and how it was answered."""

    def __init__(self, state):
        self.state = state
        self.answers = defaultdict(Counter)

    def note(self, operation, response):
        self.answers[operation.label][response.status_code] += 1
        when = operation.definition.raw.get("x-when")
        if {when, self.state} == {"before", "after"}:
            assert response.status_code >= 400, f"{operation.label} was done, and is for {when} the start only"

    def show(self):
        print(f"{'operation':40} {'answers':>7}  by status code")
        for label in sorted(self.answers, key=lambda label: label.split()[::-1]):
            answers = self.answers[label]
            shown = ", ".join(f"{count} x {status}" for status, count in sorted(answers.items()))
            print(f"{label:40} {answers.total():7}  {shown}")


class Conformance:
    def __init__(self, document, url, transport):
        self.document, self.url, self.transport = document, url, transport
        self.schema = schemathesis.openapi.from_path(document)
        operations = [found.ok() for found in self.schema.get_all_operations()]
        # Those after which the connection is something else are no client's of HTTP alone: tests of machines that move do them.
        self.switching = [operation.path for operation in operations if "101" in operation.definition.raw["responses"]]
        self.operations = [operation for operation in operations if operation.path not in self.switching]
        self.session = requests.Session()

    def ask(self, operation, body=None):
        """Does an operation with a body of the document's, and checks the answer."""
        given = {"body": body, "media_type": "application/json"} if body is not None else {}
        names = {name.definition["name"]: name.definition["example"] for name in operation.path_parameters}
        case = operation.Case(path_parameters=names, **given)
        response = case.call(base_url=self.url, session=self.session)
        case.validate_response(response)
        return response

    def examples(self, operation):
        """The document's bodies for an operation, by name; a single None where it has none."""
        body = operation.definition.raw.get("requestBody")
        if body is None:
            return {"": None}
        found = body["content"]["application/json"]["examples"]
        return {name: example["value"] for name, example in found.items()}

    def walk(self, now, guest_args):
        """Does what can be done `before` or `after` the start, as the examples have it."""
        # What is looked at or changed has to be there, and what goes goes last.
        methods = ["put", "get", "patch", "delete"]
        for operation in sorted(self.operations, key=lambda operation: methods.index(operation.method)):
            if operation.definition.raw["x-when"] not in (now, "always"):
                continue
            if now == "before" and self.transport == "pci" and operation.label in PLUGGED:
                continue
            for name, body in self.examples(operation).items():
                if operation.label == START and (name == "start" or now == "before"):
                    continue
                if operation.label == "PUT /boot-source":
                    body = body | {"boot_args": f"{guest_args} {body['boot_args']}"}
                self.must_be_done(operation, body, now)

    def must_be_done(self, operation, body, now):
        excuses = EXCUSED[now] | (EXCUSED_ON[self.transport] if now == "after" else {})
        excuse = excuses.get(operation.label)
        response = self.ask(operation, body)
        said = f"{operation.label} {body}: {response.status_code} {response.text}"
        if excuse is None:
            assert response.status_code < 300, said
        else:
            assert response.status_code == 400 and excuse in response.json()["fault_message"], said

    def start(self):
        operation = next(operation for operation in self.operations if operation.label == START)
        self.must_be_done(operation, {"action_type": "InstanceStart"}, "before")

    def undocumented(self):
        """Methods that the document does not have must not be there."""
        documented = {operation.label for operation in self.operations}
        possible = itertools.product(
            ["GET", "PUT", "PATCH", "DELETE"], sorted({operation.path for operation in self.operations})
        )
        for method, path in possible:
            if f"{method} {path}" in documented:
                continue
            body = {"json": {}} if method in ("PUT", "PATCH") else {}
            response = self.session.request(method, self.url + path.translate({ord(c): None for c in "{}"}), **body)
            assert response.status_code == 400, f"{method} {path} is not in the document: {response.text}"
            assert "no such operation" in response.json()["fault_message"], f"{method} {path}: {response.text}"

    def fuzz(self, brief):
        """Has schemathesis make requests, and returns how it ended."""
        phases = "examples" if brief else "examples,coverage,fuzzing"
        if brief:
            # Those that have no examples.
            for operation in self.operations:
                if "requestBody" not in operation.definition.raw:
                    self.ask(operation)
        arguments = ["run", self.document, "--url", self.url, "--checks", ",".join(CHECKS)]
        arguments += ["--phases", phases, "--max-examples", "10"]
        arguments += ["--generation-deterministic"]
        for path in self.switching:
            arguments += ["--exclude-path", path]
        arguments += ["--continue-on-failure", "--no-color", "--warnings", "off", "--suppress-health-check", "all"]
        try:
            command_line(arguments)
        except SystemExit as end:
            return end.code
        return 0


def count_answers(book):
    @schemathesis.hook
    def after_call(context, case, response):
        book.note(case.operation, response)

    @schemathesis.hook
    def map_case(context, case):
        """A device's name is the same in path and body, where the body is not wrong on purpose."""
        if case.meta.generation.mode.is_positive and isinstance(case.body, dict):
            names = case.path_parameters or {}
            case.body.update({name: names[name] for name in names if isinstance(case.body.get(name), str)})
        return case


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", required=True, help="openapi.yaml")
    parser.add_argument("--socket", required=True, help="of a new VMM; with `--state before`, without a kernel")
    parser.add_argument("--state", choices=["before", "after"], required=True, help="the start")
    parser.add_argument("--transport", choices=["mmio", "pci"], required=True, help="the VMM's")
    parser.add_argument("--guest-args", default="", help="put before the guest's command line")
    parser.add_argument("--brief", action="store_true", help="the examples only, for a slow machine")
    arguments = parser.parse_args()

    book = Book(arguments.state)
    conformance = Conformance(arguments.document, forward(arguments.socket), arguments.transport)
    if arguments.state == "after":
        conformance.walk("before", arguments.guest_args)
        conformance.start()
        conformance.walk("after", arguments.guest_args)
    conformance.undocumented()
    count_answers(book)
    end = conformance.fuzz(arguments.brief)
    book.show()
    missing = {operation.label for operation in conformance.operations} - book.answers.keys()
    assert not missing, f"not driven: {sorted(missing)}"
    assert end == 0, f"schemathesis found something (exit code {end})"
    state = conformance.session.get(conformance.url + "/").json()["state"]
    assert (state == "Not started") == (arguments.state == "before"), state
    print(f"conformance on {arguments.transport} {arguments.state} the start ok")


if __name__ == "__main__":
    sys.exit(main())
