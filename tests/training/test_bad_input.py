"""A user's mistakes: one clear message, exit code 2, no traceback, nothing written over."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.checkpoint.small_models import edit_json
from tests.training.workspace import make_workspace


def fail(recipe: Path, *overrides: str, limit_file_bytes: int | None = None) -> str:
    """Runs the training command, which must end with exit code 2 and no traceback; returns its message."""

    def limit() -> None:
        assert limit_file_bytes is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_bytes, limit_file_bytes))

    command = [sys.executable, "-m", "longred_megatron.train", str(recipe), *overrides]
    done = subprocess.run(
        command, text=True, capture_output=True, timeout=300, preexec_fn=limit if limit_file_bytes else None
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "error:" in done.stderr
    return done.stderr[done.stderr.index("error:") :]


def remove_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "model" / "config.json", model_type="mamba")


def large_tokenizer(folder: Path) -> None:
    (folder / "texts.json").write_text(json.dumps({"vocab_size": 5000}))


def missing_texts(folder: Path) -> None:
    (folder / "texts.idx").unlink()


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (remove_weights, r"safetensors"),
    (truncate_weights, r"model\.safetensors"),
    (unknown_architecture, r"'mamba' is not supported; supported are llama"),
    (large_tokenizer, r"vocabulary of 5000, but the model has 101"),
    (missing_texts, r"prepare_data"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_input(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    change(tmp_path)
    assert re.search(message, fail(recipe))
    assert not (tmp_path / "run").exists()


def test_a_later_teacher_without_weights_is_found_before_the_first_phase(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    objectives = {"short_to_long": None, "short_restoration": None}
    first = {"teacher": None, "objectives": objectives, "training": {"steps": 1}}
    recipe.write_text(yaml.safe_dump(values | {"phases": [first, {"training": {"steps": 1}}]}))
    (tmp_path / "teacher" / "model.safetensors").unlink()
    assert re.search(r"teacher: neither model\.safetensors nor", fail(recipe))
    assert not (tmp_path / "run").exists()


def test_all_mistakes_of_a_recipe_come_together(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    message = fail(recipe, "objectives.long_text.sequence_lenght=8", "optimizer.lr=fast", "colour=red")
    assert "did you mean `sequence_length`" in message
    assert "optimizer.lr" in message and "colour" in message


def test_cross_checks_come_together(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    message = fail(recipe, "objectives.short_restoration.layers=[1,9]", "model.max_position_embeddings=32")
    assert "9" in message and "3" in message  # the layer, and how many there are
    assert "32" in message and "64" in message  # the target window, and the original


def test_a_set_too_short_for_one_sequence(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    size = "objectives.long_text.sequence_length=65536"
    message = fail(recipe, size, "step.tokens_per_microbatch=65536", "model.max_position_embeddings=65536")
    assert "texts" in message and "65537" in message.replace(",", "")


def test_a_run_folder_of_another_recipe_is_left_alone(tmp_path: Path) -> None:
    recipe, run = make_workspace(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    assert "not a run folder" in fail(recipe)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"optimizer": {"lr": 1.0}}))
    assert "belongs to another recipe" in fail(recipe)
    assert (run / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in run.iterdir()) == ["recipe.yaml", "thesis.txt"]


def test_a_loss_that_is_not_finite_names_step_objective_and_remedy(tmp_path: Path) -> None:
    message = fail(make_workspace(tmp_path), "optimizer.lr=1.0e20", "optimizer.clip_grad=0")
    assert re.search(r"step \d+: (loss|grad_norm)\S* is (nan|inf)", message)
    assert "optimizer.lr" in message and "no checkpoint" in message
    assert "fp32" not in message  # no GPU has a fused attention for it


@pytest.mark.parametrize(
    ("failing", "how"), [(4, ()), (3, ("training.async_save=true", "training.checkpoint_every_steps=1"))]
)
def test_a_full_disk_keeps_the_last_good_checkpoint(failing: int, how: tuple[str, ...], tmp_path: Path) -> None:
    recipe, run = make_workspace(tmp_path), tmp_path / "run"
    subprocess.run(
        [sys.executable, "-m", "longred_megatron.train", str(recipe), "training.steps=2"],
        check=True,
        timeout=300,
    )
    checkpoint = run / "checkpoints" / "step-000002"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    message = fail(recipe, "training.steps=4", *how, limit_file_bytes=100_000)
    assert f"step-{failing:06}: the checkpoint could not be written" in message and "free space" in message
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
