"""Set-up finds a working Python 3.12 among broken ones, or says what it tried, and can be interrupted."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

# Stands in for a Python: `-c` is the probe of find_python.sh, which prints the path of the interpreter.
WORKING = 'echo "$0"'
WARNING = 'echo "a warning" >&2; echo "of two lines" >&2; echo "$0"'
SHIM = 'echo "pyenv: python3.12: command not found" >&2; exit 127'
OTHER_VERSION = "echo 'is Python 3.11' >&2; exit 1"
SILENT = "exit 1"


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def find_python(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs find_python.sh where there is nothing but what the test put under `tmp_path`."""
    bare = {"HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "bin")} | environment
    command = ["/bin/sh", str(TOOLS / "find_python.sh"), str(tmp_path / "system")]
    return subprocess.run(command, env=bare, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3.12",
        "bin/python3",
        "home/.pyenv/versions/3.12.7/bin/python",
        "home/.local/share/uv/python/cpython-3.12.7-linux-x86_64-gnu/bin/python3.12",
        "home/miniconda3/envs/some/bin/python",
        "system/python3.12",
    ],
)
def test_finds_python_where_it_is_behind_a_failing_shim(tmp_path: Path, place: str) -> None:
    executable(tmp_path / "bin" / "python3.12", SHIM)
    executable(tmp_path / "bin" / "python", OTHER_VERSION)
    working = executable(tmp_path / place, WORKING)
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout) == (0, f"{working}\n"), found.stderr


def test_other_roots_come_from_the_environment(tmp_path: Path) -> None:
    working = executable(tmp_path / "elsewhere" / "versions" / "3.12.1" / "bin" / "python", WORKING)
    found = find_python(tmp_path, PYENV_ROOT=str(tmp_path / "elsewhere"))
    assert found.stdout == f"{working}\n"


def test_the_users_choice_comes_first(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python3.12", WORKING)
    chosen = executable(tmp_path / "chosen", WORKING)
    found = find_python(tmp_path, PYTHON=str(chosen))
    assert (found.stdout, found.stderr) == (f"{chosen}\n", "")


@pytest.mark.parametrize("choice", ["missing", "broken"])
def test_a_choice_that_does_not_work_is_named(tmp_path: Path, choice: str) -> None:
    working = executable(tmp_path / "bin" / "python3.12", WORKING)
    executable(tmp_path / "broken", SILENT)
    found = find_python(tmp_path, PYTHON=str(tmp_path / choice))
    assert found.stdout == f"{working}\n"
    assert f"PYTHON={tmp_path / choice} is passed over" in found.stderr


def test_only_the_path_is_printed(tmp_path: Path) -> None:
    working = executable(tmp_path / "bin" / "python3.12", WARNING)
    assert find_python(tmp_path).stdout == f"{working}\n"


def test_says_what_was_tried_when_there_is_none(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python3.12", SHIM)
    executable(tmp_path / "bin" / "python3", OTHER_VERSION)
    executable(tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python", SILENT)
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    for part in (
        "python3.12: pyenv: python3.12: command not found",
        "python3: is Python 3.11",
        "python: not on PATH",
        "/.pyenv/versions/3.12.1/bin/python: does not run",
        f"in: {tmp_path / 'system'}",
        "PYTHON=/path/to/python3.12 make setup",
    ):
        assert part in found.stderr


# A Python for setup.sh: `-m venv` copies it, calls of pip are logged, and the file pip-fails makes them fail.
FAKE_PYTHON = """
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    "-m venv "*) mkdir -p .venv/bin .venv/lib && cp "$0" .venv/bin/python ;;
    "-m pip "*) echo "$*" >>pip-log; [ ! -e pip-fails ] ;;
    *) echo "$here/python3.12" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "tools").mkdir(parents=True)
    for script in ("setup.sh", "find_python.sh"):
        shutil.copy(TOOLS / script, root / "tools")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    executable(tmp_path / "python" / "python3.12", FAKE_PYTHON)
    return root


def setup(project: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(project.parent / "python" / "python3.12")}
    command = ["/bin/sh", str(project / "tools" / "setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def pip_calls(project: Path) -> list[str]:
    log = project / "pip-log"
    calls = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return calls


def test_setup_installs_with_the_constraints_and_then_does_nothing(project: Path) -> None:
    assert setup(project).returncode == 0
    calls = pip_calls(project)
    assert calls and all("--constraint constraints.txt" in call for call in calls)
    again = setup(project)
    assert (again.returncode, again.stdout, pip_calls(project)) == (0, "", [])


def test_setup_that_failed_is_not_complete_when_the_change_is_taken_back(project: Path) -> None:
    setup(project)
    constraints = project / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(before + "# changed\n")
    (project / "pip-fails").touch()
    assert setup(project).returncode == 1

    constraints.write_text(before)
    (project / "pip-fails").unlink()
    pip_calls(project)
    assert setup(project).returncode == 0
    assert pip_calls(project)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_setup_installs_again_when_a_dependency_changed(project: Path, name: str) -> None:
    setup(project)
    pip_calls(project)
    (project / name).write_text((project / name).read_text() + "# changed\n")
    assert setup(project).returncode == 0
    assert pip_calls(project)


def test_setup_installs_again_when_the_folder_moved(project: Path) -> None:
    setup(project)
    pip_calls(project)
    moved = project.rename(project.with_name("moved"))
    assert setup(moved).returncode == 0
    assert pip_calls(moved)


def test_interrupted_setup_carries_on(project: Path) -> None:
    (project / "pip-fails").touch()
    failed = setup(project)
    assert failed.returncode == 1
    assert '"make setup" carries on' in failed.stderr
    installed = project / ".venv" / "lib" / "whole-1.dist-info"
    cut_off = project / ".venv" / "lib" / "half-1.dist-info"
    for folder in (installed, cut_off):
        folder.mkdir()
        (folder / "METADATA").touch()
    (installed / "RECORD").touch()
    pip_calls(project)

    (project / "pip-fails").unlink()
    assert setup(project).returncode == 0
    assert pip_calls(project)
    assert installed.exists(), "what was there is kept"
    assert not cut_off.exists(), "pip would take it for installed"


def test_broken_environment_is_replaced(project: Path) -> None:
    setup(project)
    executable(project / ".venv" / "bin" / "python", SHIM)
    (project / ".venv" / "leftover").touch()
    repaired = setup(project)
    assert repaired.returncode == 0, repaired.stderr
    assert "replacing .venv" in repaired.stdout
    assert not (project / ".venv" / "leftover").exists()


def test_setup_stops_where_there_is_no_python(project: Path) -> None:
    executable(project / "tools" / "find_python.sh", "echo 'error: no Python' >&2; exit 2")
    failed = setup(project)
    assert (failed.returncode, failed.stderr) == (2, "error: no Python\n")
    assert not (project / ".venv").exists()
