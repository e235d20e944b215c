"""The checkpoints of a real run, beside the model that it started from."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longred_megatron.errors import UserError
from longred_megatron.evaluation import page
from longred_megatron.evaluation.evaluate import evaluate
from longred_megatron.evaluation.settings import Settings
from tests.evaluation.conftest import byte_tokenizer
from tests.training.workspace import make_workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and `run`: two steps of training it, a checkpoint of each, and the export of the last."""
    folder = tmp_path_factory.mktemp("workspace")
    recipe = make_workspace(folder, sizes={"vocab_size": 258})
    byte_tokenizer().save_pretrained(folder / "model")
    steps = ("training.steps=2", "training.checkpoint_every_steps=1")
    command = [sys.executable, "-m", "longred_megatron.train", str(recipe), *steps]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_checkpoint_is_measured_and_the_last_is_the_export(
    workspace: Path, text_file: Path, tmp_path: Path
) -> None:
    texts = {"short_texts": (text_file,), "long_texts": (text_file,), "device": "cpu"}
    sizes = {"num_short_windows": 3, "num_long_windows": 2, "num_depths": 1, "num_prompt_sets": 2, "num_samples": 1}
    settings = Settings(**texts, **sizes, lengths=(192,), tasks=("passkey",))
    models = [workspace / "model", workspace / "run" / "hf"]
    report = evaluate(models, tmp_path, settings=settings, runs=[workspace / "run"])
    original, export, first, last = report.models
    assert [(model.name, model.run, model.step) for model in report.models] == [
        ("model", None, None),
        ("hf", None, None),
        ("run step 1", "run", 1),
        ("run step 2", "run", 2),
    ]
    assert last.short.losses == export.short.losses != first.short.losses != original.short.losses
    assert last.retrieval == export.retrieval and last.rope == export.rope
    assert last.short.against_reference == export.short.against_reference is not None
    network = AutoModelForCausalLM.from_pretrained(workspace / "run" / "hf")
    tokens = torch.tensor([byte_tokenizer()(text_file.read_text(encoding="utf-8")).input_ids[: last.short.window]])
    with torch.no_grad():
        assert last.short.losses[0] == pytest.approx(network(input_ids=tokens, labels=tokens).loss.item(), rel=1e-4)
    assert report.shown == [original, export, last]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Scores against steps" in html and html.count("<h3>") == 3  # heat maps: not of the first checkpoint
    held = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [model["step"] for model in held["models"]] == [None, None, 1, 2]
    assert "Scores against steps" not in page.render(replace(report, models=report.models[:2]))


def test_a_folder_without_checkpoints(folders: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--runs .*: no run folder with checkpoints; give the run.dir of a run"):
        evaluate([folders["base"]], tmp_path / "out", settings=Settings((text_file,)), runs=[tmp_path])
    with pytest.raises(UserError, match=r"--runs n+: .*too long; give the run.dir of a run"):
        evaluate([folders["base"]], tmp_path / "out", settings=Settings((text_file,)), runs=[Path("n" * 300)])
