"""The quick form of `make hostile`: a part of every class, one test each."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.classes import CLASSES, cases_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the quick form prints: run once, also where several workers of pytest ask for it.

    In a process of its own: cases are forked from one that runs no threads, and pytest's workers do.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the workers of this run
    report = folder / "hostile.txt"
    with (folder / "hostile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            command = [sys.executable, "-m", "tests.hostile", "--quick"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
            report.write_text(done.stdout + done.stderr)
    return report.read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_class(name: str, table: str) -> None:
    rows = [f"{name} {block}" for block in table.split(f"\n{name} ")[1:]]
    assert len(rows) == len(cases_of(name, quick=True)), f"not all cases were run: {table[-3000:]}"
    wrong = [row for row in rows if " NOT " in row.splitlines()[0]]
    assert not wrong, "\n".join(wrong)


def test_there_are_many_cases_of_every_class_and_each_has_one_name() -> None:
    assert sum(len(list(cases())) for cases in CLASSES.values()) >= 300
    for name, cases in CLASSES.items():
        names = [case.name for case in cases()]
        assert len(set(names)) == len(names), f"{name}: two cases have one name"
        assert cases_of(name, quick=True)
