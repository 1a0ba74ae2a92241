"""The package computes what it computed before its modules and names changed.

Bit for bit on the processor of the records, to 1e-6 on others.
"""

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.golden import record, renamed

RECORDS = Path(__file__).parent / "records"
TOLERANCE = 1e-6


def recorded(name):
    return json.loads((RECORDS / f"{name}.json").read_text())


def as_json(value):
    return json.loads(json.dumps(value))


@cache
def is_same_machine():
    return record.machine() == recorded("machine")


def close(found, expected, where=""):
    """Asserts equal structures with numbers within `TOLERANCE`; compares hashes on one machine."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name, value in expected.items():
            if is_same_machine() or not name.endswith("sha256"):
                close(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            close(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, TOLERANCE, TOLERANCE, err_msg=where)
    else:
        assert found == expected, where


def exact(found, expected, where=""):
    if is_same_machine():
        assert found == expected, where
    close(found, expected, where)


def test_every_config_and_variant_resolves_to_the_same_values():
    expected = {name: renamed.fields(values) for name, values in recorded("configs").items()}
    assert as_json(record.configs()) == expected


def test_fields_have_the_same_ranges_and_choices():
    expected = recorded("rules")
    choices = {
        renamed.field(name): [
            renamed.VALUES.get(renamed.field(name), {}).get(v, v) for v in allowed
        ]
        for name, allowed in expected["choices"].items()
    }
    found = as_json(record.rules())
    assert found["choices"] == choices
    for name in ("at_least", "between"):
        assert found[name] == {renamed.field(k): v for k, v in expected[name].items()}
    assert found["weights"] == expected["weights"]
    assert found["free"] == [renamed.field(name) for name in expected["free"]]


def test_no_test_is_lost():
    before = sum(len(names) for names in recorded("tests").values())
    assert sum(len(names) for names in record.names_of_tests().values()) >= before


def test_every_error_is_still_raised():
    """Counts by module and exception: wording may change, errors may not disappear."""

    def count(messages):
        counts = {}
        for file, _, exception, _ in messages:
            counts.setdefault(file.removesuffix(".py"), Counter())[exception] += 1
        return counts

    found = count(record.messages())
    for module, expected in count(recorded("messages")).items():
        modules = renamed.MODULES.get(module, [module])
        present = sum((found.get(name, Counter()) for name in modules), Counter())
        missing = expected - present - Counter(renamed.GONE.get(module))
        # A helper that creates the error may have another name.
        assert missing.total() <= (present - expected).total(), f"{module}: {missing}"


@pytest.mark.slow
@pytest.mark.parametrize("method", recorded("steps"))
def test_eight_steps_give_the_same_losses_gradient_and_state(method, tmp_path):
    name = "medclipseg:smoke" if method == "medclipseg" else f"default:smoke,{method}"
    fields = record.MEDCLIPSEG if method == "medclipseg" else {}
    found, expected = record.eight_steps(name, tmp_path, fields), recorded("steps")[method]
    close(found["float64"], expected["float64"])
    if is_same_machine():
        assert found["float32"] == expected["float32"]


@pytest.fixture(scope="module")
def evaluations():
    return as_json(record.evaluations())


@pytest.mark.slow
@pytest.mark.parametrize("name", recorded("evaluations"))
def test_evaluations_and_predictions_are_the_same(evaluations, name):
    expected = recorded("evaluations")[name]
    name = renamed.KEYS.get(name, name)
    if "results" in expected:
        expected["results"] = renamed.keys(expected["results"])
        expected["results"]["command"] = renamed.command(expected["results"]["command"])
        expected["per_image"] = [renamed.columns(line) for line in expected["per_image"]]
    exact(evaluations[name], expected, name)


@pytest.mark.slow
def test_the_same_fields_are_refused_and_exit_codes_stay():
    found, expected = record.refusals(), recorded("refusals")
    kinds = {
        " ".join((name.split(" ")[0], renamed.field(name.split(" ")[1].split("=")[0]))): error
        for name, error in expected["fields"].items()
    }
    for name, error in found["fields"].items():
        source, override = name.split(" ")
        before = kinds[f"{source} {override.split('=')[0]}"]
        assert error.split(":")[0] == before.split(":")[0], name
    assert len(found["fields"]) == len(expected["fields"])
    assert found["exit_codes"] == expected["exit_codes"]
