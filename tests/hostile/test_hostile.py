"""The quick form of `make hostile`: a part of every class, one test each."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.classes import CLASSES, cases_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CLASSES)
def test_class(name: str) -> None:
    # A process of its own: cases are forked from one that runs no threads, which pytest's workers do.
    command = [sys.executable, "-m", "tests.hostile", "--quick", "--only", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    wrong = [line for line in done.stdout.splitlines() if " NOT " in line or line.lstrip().startswith("! ")]
    assert done.returncode == 0, "\n".join([*wrong, done.stdout[-300:], done.stderr[-2000:]])


def test_there_are_many_cases_of_every_class_and_each_has_one_name() -> None:
    assert sum(len(list(cases())) for cases in CLASSES.values()) >= 300
    for name, cases in CLASSES.items():
        names = [case.name for case in cases()]
        assert len(set(names)) == len(names), f"{name}: two cases have one name"
        assert cases_of(name, quick=True)
