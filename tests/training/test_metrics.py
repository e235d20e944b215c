"""One reduction of a step's terms; the lines of a run's metrics."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from longred_megatron.layout import Parallel
from longred_megatron.objectives.base import Term
from longred_megatron.objectives.next_token import NextToken
from longred_megatron.objectives.short_restoration import ShortRestoration
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.training.metrics import LossReducer, MetricsWriter, first_non_finite, peak_flops
from longred_megatron.training.microbatches import MicroBatch

COMMON: dict[str, Any] = {"sequence_length": 8, "data": "texts"}
OBJECTIVES = {
    "plain": NextToken(microbatches=1, weight=3.0, **COMMON),
    "layers": ShortRestoration(microbatches=2, weight=5.0, layers=(9, 10), **COMMON),
}


def microbatch(objective: str) -> MicroBatch:
    empty = torch.zeros(1, 8, dtype=torch.int64)
    return MicroBatch(
        index=0,
        objective=objective,
        settings=OBJECTIVES[objective],
        tokens=empty,
        labels=empty,
        student_positions=empty,
        num_valid_tokens=8,
    )


def term(value: float, name: str | None = None, copies: Any = "each tensor rank") -> Term:
    return Term(torch.tensor(value), copies, name)


def test_means_over_micro_batches_sums_over_terms_and_the_step_loss(groups: ProcessGroupCollection) -> None:
    reduce = LossReducer(OBJECTIVES, groups)
    batches = [microbatch("layers"), microbatch("layers"), microbatch("plain")]
    reduced = reduce(batches, [[term(1, "layer_10"), term(2, "layer_9")], [term(3, "layer_10")], [term(7), term(1)]])
    assert reduced == {
        "loss": (3 * 1 * 8 + 5 * 2 * 3) / 3,
        "loss/plain": 8,
        "loss/layers": 3,
        "loss/layers/layer_9": 1,
        "loss/layers/layer_10": 2,
    }
    assert list(reduced)[-2:] == ["loss/layers/layer_9", "loss/layers/layer_10"]  # by number
    assert reduce(batches, [[], [], [term(1)]])["loss/layers"] == 0


def _two_ranks(join: Any, folder: Path) -> None:
    """Each rank knows other terms: of its stage, and shares of one term."""
    join("world")
    groups, rank = initialize(Parallel(tensor=2), seed=1), torch.distributed.get_rank()
    own = [term(1 + rank, "split", "split over tensor ranks"), term(5, "same"), term(4, f"rank_{rank}")]
    reduced = LossReducer({"plain": OBJECTIVES["plain"]}, groups)([microbatch("plain")], [own])
    (folder / f"{rank}.json").write_text(json.dumps(reduced))
    destroy()


def test_shares_are_summed_or_not_as_they_say(tmp_path: Path) -> None:
    run_ranks(_two_ranks, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    names = {name.removeprefix("loss/plain/"): value for name, value in first.items()}
    assert (names["split"], names["same"]) == (3, 5)
    assert (names["rank_0"], names["rank_1"]) == (2, 2)  # said to be on both ranks, and on one of them 0


def test_the_first_number_that_is_none_is_named() -> None:
    fine = {"step": 1, "loss": 1.0, "loss/a": 2.0, "grad_norm": 1.0}
    assert first_non_finite(fine) is None
    assert first_non_finite(fine | {"loss/a": math.nan}) == "loss/a"
    assert first_non_finite(fine | {"grad_norm": math.inf}) == "grad_norm"


@pytest.fixture
def line() -> dict[str, Any]:
    rest = {"grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0, "model_flops_utilization": None}
    return {"loss": 1.5, "loss/mine": 2.5, "loss/mine/layer_1": 3.5, **rest}


def test_the_console_shows_losses_of_objectives_and_the_file_all(tmp_path: Path, line: dict[str, Any]) -> None:
    console = io.StringIO()
    writer = MetricsWriter(tmp_path, 9, 1, console, ("loss", "loss/mine"))
    writer.write({"step": 1} | line)
    writer.close()
    assert "step 1/9  loss 1.5000  mine 2.5000  grad 1.000" in console.getvalue()
    assert "3.5" not in console.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1} | line


def test_lines_after_the_step_to_resume_at_are_written_anew(tmp_path: Path, line: dict[str, Any]) -> None:
    lines = [json.dumps({"step": step} | line) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 4, "lo')  # the last: cut off
    MetricsWriter(tmp_path, 9, 3, io.StringIO(), ()).close()
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in kept] == [1, 2]


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA GB200", 2500e12, 5000e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_the_peak_is_that_of_the_card_and_format(monkeypatch, name, bf16, fp8):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert (peak_flops(False), peak_flops(True)) == (bf16, fp8)
