"""The harness really runs here, on a data set of a few lines that the test writes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longred_megatron.errors import UserError
from longred_megatron.evaluation.benchmarks.harness import ALLOW_CODE, chosen_benchmarks, measure_benchmarks
from longred_megatron.evaluation.benchmarks.published import PUBLISHED
from longred_megatron.evaluation.models import CausalModel

pytest.importorskip("lm_eval")

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    {"question": f"{n} and {n} is", "choices": [str(2 * n), str(3 * n + 1)], "answer": n % 2} for n in range(9)
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets: Any = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (folder / "sums.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


def test_a_task_is_measured_as_plain_transformers_does(tasks: Path, base: CausalModel) -> None:
    [benchmark] = chosen_benchmarks(["sums", "sums"], tasks)
    [result] = measure_benchmarks(base, [benchmark], tokens_per_batch=1024)
    assert result.scores == tuple(float(right) for right in _answered_right(base))
    assert 0 < result.score < 1 and result.score == pytest.approx(sum(result.scores) / 9)
    assert (result.benchmark, result.metric, result.num_questions) == ("sums", "acc,none", 9)


def test_a_checkpoint_is_asked_with_the_tokenizer_that_was_taken_for_it(
    tasks: Path, base: CausalModel, tmp_path: Path
) -> None:
    """Its folder holds none."""
    benchmarks = chosen_benchmarks(["sums"], tasks)
    checkpoint = replace(base, facts=replace(base.facts, path=tmp_path))
    assert measure_benchmarks(checkpoint, benchmarks, 1024) == measure_benchmarks(base, benchmarks, 1024)
    assert base.encoder.tokenizer.pad_token is None  # the harness has set its own copy's


@torch.no_grad()
def _answered_right(model: CausalModel) -> list[bool]:
    """Whether the right choice has the larger probability: the sum of log P(token) over its tokens after the text."""
    right = []
    for question in QUESTIONS:
        sums = []
        for choice in question["choices"]:
            start, whole = (model.encoder.encode(t) for t in (question["question"], f"{question['question']} {choice}"))
            losses = model.network(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(losses[place - 1, whole[place]] for place in range(len(start), len(whole))))
        right.append(bool(sums[question["answer"]] > sums[1 - question["answer"]]))
    return right


def test_a_data_set_that_is_not_on_disk_is_named() -> None:
    """In a process in which nobody has forbidden the network."""
    code = (
        "from longred_megatron.evaluation.benchmarks.harness import chosen_benchmarks\n"
        "from longred_megatron.errors import UserError\n"
        "try: chosen_benchmarks(['piqa', 'drop'], None)\n"
        "except UserError as error: print(*error.problems, sep='\\n')\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith("OFFLINE")}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    first, second = ran.stdout.splitlines()
    assert re.search(r"--benchmarks piqa: its data set baber/piqa is not on disk .*lm_eval --tasks piqa", first)
    assert "offline" in first.lower() and "EleutherAI/drop is not on disk" in second


def test_code_is_not_run_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_CODE, raising=False)
    with pytest.raises(UserError, match="runs code that the model writes; set HF_ALLOW_CODE_EVAL=1"):
        chosen_benchmarks(["humaneval"], None)


def test_unknown_names_and_folders(tasks: Path) -> None:
    with pytest.raises(UserError, match="--benchmarks pika: no such benchmark; did you mean piqa"):
        chosen_benchmarks(["pika"], tasks)
    with pytest.raises(UserError, match=r"there are mmlu, .*, sums"):
        chosen_benchmarks(["zzz"], tasks)
    with pytest.raises(UserError, match="--benchmark-tasks none: no such folder"):
        chosen_benchmarks(["sums"], Path("none"))


def test_a_broken_task_is_told(tasks: Path) -> None:
    (tasks / "sums.yaml").write_text(TASK.format(data="none.jsonl"), encoding="utf-8")
    with pytest.raises(UserError, match="--benchmarks sums: cannot be loaded"):
        chosen_benchmarks(["sums"], tasks)


def test_no_harness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install it with: pip install 'longred-megatron\[eval\]'"):
        chosen_benchmarks(["piqa"], None)
    assert chosen_benchmarks([], None) == []


@pytest.mark.parametrize("benchmark", PUBLISHED.values(), ids=lambda benchmark: benchmark.name)
def test_the_list_agrees_with_the_harness(benchmark: Any) -> None:
    """Its task and its data set stand in the harness's own files, and its metric's name."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix != ".md"]
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert any(re.search(rf"^(task|group): {benchmark.task}$", text, re.MULTILINE) for text in texts)
    assert any(re.search(rf"(dataset_path: |DATASET_PATH = \"){benchmark.dataset}\b", text) for text in texts)
    name, _, kind = benchmark.metric.partition(",")
    assert any(re.search(rf"\b{name.partition('@')[0]}\b|pass_at_k", text) for text in texts)
    assert kind == "none" or any(f'name: "{kind}"' in text or f"name: {kind}" in text for text in texts)
