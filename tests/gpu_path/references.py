"""The CPU path, for comparison: in processes of its own, which cannot import Transformer Engine.

python -m tests.gpu_path.references FOLDER < pickled cases
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.layouts.ranks import Case, Outcome, _outcome, run_all


def run_on_cpu(cases: Sequence[Case], folder: Path) -> Mapping[str, Outcome]:
    """As `ranks.run_all`, without Transformer Engine."""
    command = [sys.executable, "-m", "tests.gpu_path.references", str(folder)]
    subprocess.run(command, input=pickle.dumps(cases), env=os.environ | {"LONGRED_DEVICE": "cpu"}, check=True)
    return {case.name: _outcome(folder / case.name) for case in cases}


if __name__ == "__main__":
    run_all(pickle.load(sys.stdin.buffer), Path(sys.argv[1]))
