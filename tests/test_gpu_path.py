"""The tests of the GPU path, a process for each file: Megatron is imported with Transformer Engine there, and without
it everywhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRANSFORMER_ENGINE = Path(sys.prefix) / "transformer-engine"  # its Python alone, see tools/setup.sh
FILES = sorted((ROOT / "tests" / "gpu_path").glob("test_*.py"))


@pytest.mark.skipif(not TRANSFORMER_ENGINE.is_dir(), reason="needs Transformer Engine's Python: make setup")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_gpu_path(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-n0", "-p", "no:cacheprovider"]
    # Megatron, in another test of this process, may have chosen attention's backend.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")} | {
        "LONGRED_TE": "stub",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TRANSFORMER_ENGINE))),
    }
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-5000:]
