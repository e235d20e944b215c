"""Whole runs through the command line: resume, replicas, stop requests, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.training.workspace import make_workspace, read_metrics, without_times


def start(recipe: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "longred_megatron.train", str(recipe), *overrides]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(recipe: Path, *overrides: str, ranks: int = 1) -> str:
    process = start(recipe, *overrides, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_and_three_more_equal_six(precision: str, tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, precision={"params": precision})
    train(recipe, f"run.dir={tmp_path}/whole")
    train(recipe, f"run.dir={tmp_path}/parts", "training.steps=3")
    out = train(recipe, f"run.dir={tmp_path}/parts")
    assert "resuming after step 3" in out
    assert_bitwise_equal(exported(tmp_path / "whole"), exported(tmp_path / "parts"))
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert without_times(whole) == without_times(parts)
    assert [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    after_3 = load_file(tmp_path / "parts" / "hf-step-000003" / "model.safetensors")
    assert any(not torch.equal(t, after_3[n]) for n, t in exported(tmp_path / "parts").items())


def test_two_replicas_train_what_one_does(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    dump = f"debug.dump_microbatches={tmp_path}"
    train(recipe, f"run.dir={tmp_path}/one", "training.steps=2", f"{dump}/dump-one")
    train(recipe, f"run.dir={tmp_path}/two", "training.steps=2", f"{dump}/dump-two", ranks=2)
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in (n for n in one if n.startswith("loss") or n == "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    # Adam divides by the root of the squared gradient: a weight whose gradient is rounding noise may move by lr.
    for name, tensor in exported(tmp_path / "one").items():
        torch.testing.assert_close(exported(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert sorted(p.name for p in (tmp_path / "dump-two").iterdir()) == [
        f"step-{step:05}.dp-{replica}.safetensors" for step in (1, 2) for replica in (0, 1)
    ]
    with safe_open(tmp_path / "dump-one" / "step-00001.dp-0.safetensors", "pt") as file:
        objectives = json.loads(file.metadata()["objectives"])
    assert sorted(objectives) == sorted(["long_text", "short_to_long", "short_restoration"] * 2)
    assert objectives[-1] == "long_text"


def test_the_run_folder_and_the_step_loss(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    out = train(recipe, "training.steps=4", "training.checkpoint_every_steps=1", "training.keep_checkpoints=2")
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "hf",
    }
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert any((run / "tensorboard").iterdir())
    assert "step 4/4" in out and "left" in out
    for line in read_metrics(run):
        weighted = 1 * 2 * line["loss/long_text"] + 10 * 2 * line["loss/short_to_long"]
        weighted += 5 * 2 * line["loss/short_restoration"]
        assert line["loss"] == pytest.approx(weighted / 6)
        layers = [line[f"loss/short_restoration/layer_{k}"] for k in (1, 3)]
        assert line["loss/short_restoration"] == pytest.approx(sum(layers))
        assert line["tokens"] == line["step"] * 6 * 256
        assert line["model_flops_utilization"] is None
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_theta"] == 1e6
    again = train(recipe, "training.steps=4")
    assert "all 4 steps are done" in again


def test_the_teacher_is_frozen_and_saved_nowhere(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    script = """
import sys, torch
from longred_megatron import train
from longred_megatron.training import run as runs
seen = {}
build = runs.build
def parameters_of_teachers(run):
    return [p for chunks in run.train_step.teachers.models.values() for chunk in chunks for p in chunk.parameters()]
def spy(*args):
    run = build(*args)
    seen["run"], seen["before"] = run, [p.clone() for p in parameters_of_teachers(run)]
    return run
runs.build = spy
train.main(sys.argv[1:])
run, teacher = seen["run"], parameters_of_teachers(seen["run"])
assert teacher and all(torch.equal(a, b) for a, b in zip(teacher, seen["before"], strict=True))
assert all(p.grad is None and not p.requires_grad and not hasattr(p, "main_grad") for p in teacher)
owned = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
owned |= {id(p) for s in run.chunks for p in s.parameters()}
assert not owned & {id(p) for p in teacher}
"""
    subprocess.run([sys.executable, "-c", script, str(recipe), "training.steps=2"], check=True, timeout=300)
    # Everything the checkpoint holds is the student's: weights, master weights and two moments, in fp32.
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(str(tmp_path / "run/checkpoints/step-000002")).read_metadata().state_dict_metadata
    stored = sum(entry.size.numel() for entry in index.values() if hasattr(entry, "size"))
    student = sum(t.numel() for t in exported(tmp_path / "run").values())
    assert student * 4 <= stored < student * 4.2


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    process = start(recipe, "training.steps=100000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    done = len(read_metrics(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06}"]
    out = train(recipe, f"training.steps={done + 1}")
    assert f"resuming after step {done}" in out
    assert len(read_metrics(tmp_path / "run")) == done + 1


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    train(recipe, f"run.dir={tmp_path}/whole")
    process = start(recipe, "training.checkpoint_every_steps=2")
    run = tmp_path / "run"
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step-000002").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    train(recipe)
    assert without_times(read_metrics(run)) == without_times(read_metrics(tmp_path / "whole"))
    assert_bitwise_equal(exported(run), exported(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["changed", "cut short", "removed"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"steps": 4, "checkpoint_every_steps": 1})
    train(recipe, f"run.dir={tmp_path}/whole")
    train(recipe, f"run.dir={tmp_path}/damaged", "training.steps=3")
    newest = tmp_path / "damaged" / "checkpoints" / "step-000003"
    [data] = newest.glob("__0_*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content if damage == "changed" else content[:-100])
    if damage == "removed":
        data.unlink()
    out = train(recipe, f"run.dir={tmp_path}/damaged")
    assert f"{data.name}" in out and "damaged-step-000003" in out and "resuming after step 2" in out
    assert_bitwise_equal(exported(tmp_path / "whole"), exported(tmp_path / "damaged"))


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"steps": 10_000, "checkpoint_every_steps": 10_000})
    process, run = start(recipe, ranks=2), tmp_path / "run"
    beat, metrics, deadline = run / "ranks" / "rank-00001.json", run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):  # a first step: by then every rank listens
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(json.loads(beat.read_text())["pid"], signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    [checkpoint] = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{read_metrics(run)[-1]['step']:06}"


def test_context_ranks_train_what_one_does(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"steps": 2})
    train(recipe, f"run.dir={tmp_path}/one")
    train(recipe, f"run.dir={tmp_path}/two", "parallel.context=2", ranks=2)
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in (n for n in one if n.startswith("loss") or n == "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
