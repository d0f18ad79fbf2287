"""Reads Prometheus text from standard input by Prometheus' own parser, and prints each sample as `name {labels} value`."""

import json
import sys

from prometheus_client.parser import text_string_to_metric_families

families = list(text_string_to_metric_families(sys.stdin.read()))
assert families, "there are no metrics"
for family in families:
    assert family.type in ("counter", "gauge"), f"{family.name} is a {family.type}"
    assert family.samples, f"{family.name} has no samples"
    for sample in family.samples:
        print(sample.name, json.dumps(sample.labels, sort_keys=True), f"{sample.value:g}")
