"""Label subsets: nested, by patient, the same on every machine."""

import hashlib
import itertools

import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.data import label_subset

IDS = [f"sub-S{i // 3:03d}_ses-{i}" for i in range(60)] + [f"covid_{i}" for i in range(40)]
FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def test_subsets_are_nested():
    selected = [set(label_subset.select_rows(IDS, fraction)) for fraction in FRACTIONS]
    for small, large in itertools.pairwise(selected):
        assert small < large
    assert selected[-1] == set(range(100))


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_fraction_is_exceeded_by_less_than_a_patient(fraction):
    rows = label_subset.select_rows(IDS, fraction)
    assert fraction * 100 <= len(rows) < fraction * 100 + 3
    assert rows == sorted(set(rows))


def test_patients_are_not_split():
    selected = set(label_subset.select_rows(IDS, 0.25))
    for patient in range(20):
        rows = set(range(3 * patient, 3 * patient + 3))
        assert rows <= selected or not rows & selected


def test_order_is_that_of_the_hash_not_of_the_files():
    first = min(
        {label_subset.patient_of(name) for name in IDS},
        key=lambda name: hashlib.sha256(f"7:{name}".encode()).hexdigest(),
    )
    expected = {name for name in IDS if label_subset.patient_of(name) == first}
    for order in (IDS, IDS[::-1]):
        assert {order[row] for row in label_subset.select_rows(order, 0.01, seed=7)} == expected


def test_names_without_a_patient_are_separate_patients():
    assert label_subset.patient_of("sub-S09345_ses-E16849_run-1") == "sub-s09345"
    assert label_subset.patient_of("sub-s09345_ses-E1") == "sub-s09345"
    assert label_subset.patient_of("covid_12") == "covid_12"


def test_report_counts_images_and_patients():
    rows = label_subset.select_rows(IDS, 0.1)
    report = label_subset.report(IDS[row] for row in rows)
    assert report["ids"] == [IDS[row] for row in rows]
    assert report["num_images"] == len(rows)
    assert report["num_patients"] == len({label_subset.patient_of(name) for name in report["ids"]})


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_rejects_fractions_out_of_range(fraction):
    with pytest.raises(UserError, match="label_fraction"):
        label_subset.select_rows(IDS, fraction)
