"""The commands below torchrun, on a run with checkpoints: two processes share the texts and give one answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils._pytree import tree_leaves

from longred_megatron.analysis.measure import Ranks
from longred_megatron.errors import UserError
from tests.training.workspace import make_workspace
from tools import analyze

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def python(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its model, and `run`: two steps of it, a checkpoint of each."""
    folder = tmp_path_factory.mktemp("workspace")
    recipe = make_workspace(folder)
    python("-m", "longred_megatron.train", recipe, "training.steps=2", "training.checkpoint_every_steps=1")
    return folder


def test_drift_of_a_runs_checkpoints(folder: Path, tmp_path: Path) -> None:
    def measured(name: str, launcher: tuple[str, ...]) -> list[dict[str, Any]]:
        models = ("--hf", folder / "model", "--runs", folder / "run", "--text", folder / "texts")
        size = ("--texts", 3, "--length", 40)  # an odd number: the processes have unequal shares
        python(*launcher, "tools/analyze.py", "drift", *models, *size, "--output", tmp_path / name)
        found: list[dict[str, Any]] = json.loads((tmp_path / name / "results.json").read_text())["models"]
        return found

    one, two = measured("one", ()), measured("two", TORCHRUN)
    assert [each["step"] for each in one] == [each["step"] for each in two] == [1, 2]
    for a, b in zip(one, two, strict=True):
        ours, theirs = (each["drift"]["40"] for each in (a, b))
        for key in ("mean_drift", "mean_similarity", "loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    first, second = (each["drift"]["40"]["mean_drift"] for each in one)
    assert 0 < first != second > 0
    assert "Drift over the run" in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.parametrize("study", ["positional-vectors", "perturbation", "query-states"])
def test_the_other_studies(study: str, folder: Path, tmp_path: Path) -> None:
    models = ["--hf", folder / "model", *[folder / "teacher"] * (study == "query-states"), "--text", folder / "texts"]
    texts = 1 if study == "query-states" else 3  # one: the second process has none
    size = ("--texts", texts, "--length", 20 if study == "perturbation" else 80)
    python(*TORCHRUN, "tools/analyze.py", study, *models, *size, "--output", tmp_path / "two")
    analyze.main([study, *map(str, models), *map(str, size), "--output", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    numbers = [[x for x in tree_leaves(found) if isinstance(x, float)] for found in (one, two)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6) and len(numbers[0]) > 20


def test_the_layers_that_are_chosen(folder: Path, tmp_path: Path) -> None:
    def chosen(name: str, launcher: tuple[str, ...]) -> dict[str, Any]:
        size = ("--texts", 3, "--length", 40, "--output", tmp_path / name)
        out = python(*launcher, "tools/select_layers.py", folder / "recipe.yaml", *size)
        assert out.count("layers:") == 1  # the first rank alone speaks
        found: dict[str, Any] = json.loads((tmp_path / name / "drift.json").read_text())
        return found

    one, two = chosen("one", ()), chosen("two", TORCHRUN)
    assert one["ranking"] == two["ranking"] and one["chosen"] == two["chosen"]
    assert one["layers"] == pytest.approx(two["layers"], rel=1e-5)


def test_the_first_rank_alone_tries_the_output_and_both_refuse_it(folder: Path, tmp_path: Path) -> None:
    """Each would take the other's trial file for something of the user's."""
    (tmp_path / "notes.txt").write_text("mine")
    models = ("--hf", folder / "model", folder / "run" / "hf", "--text", folder / "texts")
    command = (*TORCHRUN, "tools/analyze.py", "drift", *models, "--output", tmp_path)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True, timeout=300)
    message = f"error: --output {tmp_path}: is not empty and holds no earlier report; give a new folder\n"
    assert done.returncode == 1 and message in done.stderr and "unexpected" not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    Ranks(rank=1, size=1).check(lambda: pytest.fail("not the first rank"))
    with pytest.raises(UserError, match="one\ntwo"):
        Ranks().check(_two_mistakes)


def _two_mistakes() -> None:
    raise UserError("one", "two")
