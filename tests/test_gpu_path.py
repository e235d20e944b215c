"""The tests of the GPU path, a process for each file: Megatron is imported with Transformer Engine there, and without
it everywhere else."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests" / "gpu_path").glob("test_*.py"))


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs the extra te-python")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_gpu_path(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-n0", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"LONGRED_TE": "stub"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-5000:]
