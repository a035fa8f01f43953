"""The faults of the kernels that `make mutants` knows fit the kernels there are."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = tomllib.loads((ROOT / "tests" / "mutants" / "kernels.toml").read_text(encoding="utf-8"))["fault"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["what"])
def test_a_fault_of_a_kernel_changes_one_place_and_leaves_python(fault):
    text = (ROOT / fault["file"]).read_text(encoding="utf-8")
    assert text.count(fault["old"]) == 1
    changed = text.replace(fault["old"], fault["new"])
    assert changed != text
    compile(changed, fault["file"], "exec")


def test_faults_are_told_apart():
    told = [(fault["file"], fault["what"]) for fault in FAULTS]
    assert len(set(told)) == len(told) > 50
