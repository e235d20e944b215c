"""The tool itself, as it is started: by torchrun in the layout of the issue, and alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.doctor.examination import CHECKS, Section, is_healthy, verdict
from longred_megatron.doctor.findings import Finding
from longred_megatron.doctor.page import render
from longred_megatron.recipe import load_recipe
from tests.training.workspace import make_workspace

ROOT = Path(__file__).parents[2]
DOCTOR = ROOT / "tools" / "doctor.py"


def run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_clean_tree_is_healthy_at_tensor_2_by_pipeline_2(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()  # of the model only config.json is needed
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")
    done = run(*torchrun, DOCTOR, recipe, *layout, "--output", tmp_path / "page")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "healthy: no fault found" in done.stdout
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert [section["title"] for section in results["sections"]] == list(CHECKS)
    found = {each["name"]: each["status"] for section in results["sections"] for each in section["findings"]}
    assert found["4 ranks (tensor 2 x pipeline 2 x context 1) against one rank, fp32"] == "ok"
    for name in ("one rank against transformers, fp32", "loaded state, fp32", "real widths: memory", "tensor links"):
        assert found[name] == "ok"
    assert found["GPUs, Transformer Engine, apex, clocks"] == "not tried"
    assert "Healthy" in (tmp_path / "page" / "doctor.html").read_text()
    assert not list(tmp_path.glob(".doctor-*")) and not (tmp_path / "run").exists()


def test_a_leak_ends_with_code_1_and_what_to_change(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path)
    sick = Path(__file__).with_name("sick_doctor.py")
    done = run(sick, "future_seen", recipe, "--output", tmp_path / "page", PYTHONPATH=f"{ROOT}:{ROOT / 'tools'}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    [leak] = [i for i, line in enumerate(lines) if line.startswith("  wrong      causality: long_text")]
    assert "rank 0 on" in lines[leak] and "change: do not train on this machine" in lines[leak + 1]
    assert "faults found" in lines[-1] and "ok         loaded state" in done.stdout
    assert "What to change" in (tmp_path / "page" / "doctor.html").read_text()


def test_a_layout_of_more_ranks_than_there_are_is_a_users_mistake(tmp_path: Path) -> None:
    done = run(DOCTOR, make_workspace(tmp_path), "parallel.tensor=2")
    assert done.returncode == 2
    assert "must be a multiple of tensor x pipeline x context" in done.stderr
    assert "torchrun --nproc-per-node 2 tools/doctor.py" in done.stderr


@pytest.mark.parametrize(
    ("statuses", "healthy", "expected"),
    [
        (("ok", "not tried"), True, "healthy: no fault found; 1 looked at and fine, 1 not tried"),
        (("not tried",), True, "healthy: no fault found; 0 looked at and fine, 1 not tried"),
        (("wrong", "ok"), False, "1 fault found (thing 0); 1 looked at and fine, 0 not tried"),
    ],
)
def test_the_verdict(statuses: tuple[Any, ...], healthy: bool, expected: str, tmp_path: Path) -> None:
    findings = [Finding(f"thing {i}", status, "<b>", trace="a\nb") for i, status in enumerate(statuses)]
    sections = [Section("Links", findings)]
    assert is_healthy(sections) is healthy and verdict(sections) == expected
    page = render(sections, load_recipe(make_workspace(tmp_path)), "tools/doctor.py", 1.0)
    assert "&lt;b&gt;" in page and "<b>" not in page
