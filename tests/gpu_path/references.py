"""The layouts that run over Transformer Engine, and what the CPU path makes of the same recipes.

python -m tests.gpu_path.references FOLDER
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.layouts.ranks import run_all
from tests.layouts.table import Layout, cases, workspaces

LAYOUTS = (
    Layout(1, {}),
    Layout(1, {}, recompute="full"),
    Layout(1, {}, recompute="selective"),
    Layout(1, {}, model="biases"),
    Layout(1, {}, model="masked"),
    Layout(1, {}, model="kinds"),
    Layout(2, {}),
    Layout(2, {"tensor": 2, "sequence": True}),
    Layout(2, {"tensor": 2}, model="biases"),
    Layout(2, {"tensor": 2, "sequence": True}, model="tied"),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, recompute="full"),
    Layout(2, {"context": 2}),
    Layout(2, {"context": 2}, whole_sequences=True, recompute="full"),
    Layout(2, {"context": 2}, model="masked", recompute="full"),
    Layout(2, {"context": 2}, model="masked", whole_sequences=True),
    Layout(2, {"context": 2}, model="kinds"),
    Layout(4, {"context": 4}),
    Layout(4, {"tensor": 2, "context": 2, "sequence": True}, recompute="full"),
    Layout(4, {"pipeline": 2, "context": 2}, recompute="full"),
)
RECIPES = "recipes"


def write_references(folder: Path) -> None:
    """Writes the recipes and, in a process without Transformer Engine, the outcomes of one rank on the CPU."""
    command = [sys.executable, "-m", "tests.gpu_path.references", str(folder)]
    subprocess.run(command, env=os.environ | {"LONGRED_DEVICE": "cpu"}, check=True)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    run_all(cases((layout.reference for layout in LAYOUTS), workspaces(out / RECIPES)), out)
