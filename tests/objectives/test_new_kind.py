"""CONTRIBUTING's example of a new objective: one file in a scratch copy of the package, and nothing else edited."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longred_megatron.parallel.local_ranks import training_command
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.training.microbatches import MicroBatchSource
from tests.training.workspace import make_workspace, read_metrics, write_recipe
from tests.walks import example, scratch_copy

MINE = {"kind": "squared_restoration", "microbatches": 2, "sequence_length": 32, "data": "texts", "layers": [1, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    (scratch_copy(folder) / "objectives" / "squared_restoration.py").write_text(example("A new objective"))
    make_workspace(folder)
    return folder


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def train(folder: Path, objectives: dict[str, Any], *arguments: str, ranks: int = 1) -> Any:
    recipe = write_recipe(folder, objectives=objectives)
    alone = [sys.executable, "-m", "longred_megatron.train", str(recipe)]
    return run(folder, [*(training_command(recipe, ranks) if ranks > 1 else alone), *arguments])


def test_it_trains_as_plain_torch_says_in_any_layout(folder: Path) -> None:
    lines = []
    for name, ranks, *layout in (("one", 1), ("four", 4, "parallel.tensor=2", "parallel.pipeline=2")):
        arguments = (f"run.dir={folder / name}", "training.steps=2", *layout)
        done = train(folder, {"mine": MINE}, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the teacher's layers 4 to 4" in done.stdout  # deduced from what it needs
        lines.append(read_metrics(folder / name))
    one, four = ({k: v for k, v in line[1].items() if k.startswith(("loss", "grad"))} for line in lines)
    assert {"loss/mine", "loss/mine/layer_1", "loss/mine/layer_3"} < one.keys() == four.keys()
    assert one == pytest.approx(four, rel=1e-5)
    assert lines[0][0]["loss/mine"] == pytest.approx(in_plain_torch(folder), rel=1e-5)


def in_plain_torch(folder: Path) -> float:
    """The first step's loss; the texts are those of a kind that takes them alike."""
    restoration = MINE | {"kind": "short_restoration", "weight": 1.0}
    path = write_recipe(
        folder, objectives={"mine": restoration}, model={"hf": "model", "rope": "none", "max_position_embeddings": 256}
    )
    source = MicroBatchSource(*read_phases(load_recipe(path)))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / hf, dtype=torch.float32) for hf in ("model", "teacher")
    )
    student.model.rotary_emb.inv_freq = 1.0 / 1e6 ** (torch.arange(0, 8, 2) / 8)  # the recipe's theta
    total = 0.0
    for batch in source.step(1, 0, 1):
        with torch.no_grad():
            ours, theirs = (m(batch.tokens, output_hidden_states=True).hidden_states for m in (student, teacher))
        total += sum(float((ours[k] - theirs[k]).square().mean()) for k in MINE["layers"]) / 2
    return total


def test_its_mistakes_are_found_without_a_word_of_its_own(folder: Path) -> None:
    done = train(folder, {"mine": MINE | {"layers": [99, 99]}})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "`objectives.mine.layers` holds 99, 99: the layers of model.hf are 1 to 4" in done.stderr
    assert "names a layer twice" in done.stderr
    done = train(folder, {"mine": MINE | {"layrs": [1]}, "other": {"kind": "squared_restoratoin"}})
    assert "unknown key `objectives.mine.layrs`; did you mean `layers`?" in done.stderr
    assert "'squared_restoration'" in done.stderr


def test_it_is_rehearsed(folder: Path) -> None:
    done = train(folder, {"mine": MINE}, "--rehearse", "parallel.pipeline=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "and an export that transformers loads" in done.stdout
