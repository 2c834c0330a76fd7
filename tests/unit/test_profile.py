"""Kernels by their names: what they are counted as in a breakdown."""

import re
from pathlib import Path

import pytest

import twofold
from twofold.worker.profile import KINDS

OURS = {
    "attention": {"attention"},
    "attention/backends": {"attention"},
    "kv": {"exchange", "attention"},  # entries are written for the one and copied for the other
    "models/transforms": {"projections"},
    "parallel": {"exchange", "rest"},  # sums over ranks; what follows larger sums
}
JITTED = re.compile(r"^@triton\.jit.*?^def (\w+)", re.M | re.S)
ROOT = Path(twofold.__file__).parent


@pytest.mark.parametrize(("folder", "kinds"), OURS.items())
def test_our_kernels_are_known_by_name(folder: str, kinds: set[str]) -> None:
    """Those of decode attention were once renamed, and counted as the rest from then on."""
    names = [name for path in (ROOT / folder).glob("*.py") for name in JITTED.findall(path.read_text())]
    launched = [name for name in names if name.endswith(("_kernel", "_run", "_runs"))]  # the others are parts of these
    assert launched
    for name in launched:
        assert next((kind for kind, pattern in KINDS if pattern.search(name)), "rest") in kinds, name


def test_all_of_our_kernels_are_in_those_folders() -> None:
    found = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if JITTED.search(path.read_text())}
    assert found == set(OURS)
