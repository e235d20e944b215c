"""Every comparison runs at tiny sizes, and both of its sides compute the same."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from longred_megatron.bench.base import QUICK, Case, Facts, Side
from longred_megatron.bench.process import CaseError
from longred_megatron.bench.results import Result, Timed, markdown
from longred_megatron.bench.run import Bench, changed_sizes, check_facts, chosen, comparisons
from longred_megatron.errors import UserError
from longred_megatron.evaluation.report import check_output

ROOT = Path(__file__).resolve().parents[2]
TINY = QUICK.model_copy(
    update={
        "layers": 2,
        "twin_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "sequence_length": 64,
        "text_bytes": 20_000,
        "ranks": (2,),
        "matrix_size": 64,
    }
)
LONGRED = {"loss", "loss/long_text", "loss/short_to_long", "loss/short_restoration", "grad_norm"}
# What both sides of every case have to agree in.
FACTS = {
    "checkpoint": set(),
    "cross_entropy_step": {"loss", "grad_norm"},
    "distillation_step": {"loss", "grad_norm"},
    "evaluation": set(),
    "kernels": {"loss"},
    "longred_step": LONGRED,
    "prepare_data": {"tokens", "documents"},
    "scaling": LONGRED,
}


@pytest.mark.parametrize("name", comparisons())
def test_both_sides_of_every_case_agree(name: str, tmp_path: Path) -> None:
    bench = Bench(TINY, 1, print)
    bench.run(chosen([name]), tmp_path / "out", "a command")
    assert bench.results
    for result in bench.results:
        assert not result.problem
        assert FACTS[name] <= result.facts.keys()
        assert len(result.ours.seconds) == len(result.reference.seconds) == 1
        assert result.ours.peak_bytes > 0
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [each["ratio"] for each in held["results"]] == [result.ratio for result in bench.results]
    assert (tmp_path / "out" / "table.md").read_text() == markdown(bench.results)
    assert name in (tmp_path / "out" / "report.html").read_text()
    check_output(tmp_path / "out", held["kind"])  # the next run may write here


class Sum(Side):
    """Of some numbers."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = numbers

    def once(self) -> None:
        self._sum = torch.tensor(self._numbers).sum()

    def facts(self) -> Facts:
        return {"sum": float(self._sum)}


class Broken(Sum):
    """Fails at its work."""

    def once(self) -> None:
        raise MemoryError("no room")


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        (partial(Sum, 3.0), ""),
        (partial(Sum, 3.1), "ours and the reference differ: sum is 3 and 3.1"),
        (partial(Broken, 3.0), "the reference failed: MemoryError: no room"),
    ],
)
def test_what_cannot_be_compared_is_said(reference: partial[Side], problem: str) -> None:
    case = Case("a sum", partial(Sum, 1.0, 2.0), reference, 2, "numbers")
    result = Bench(TINY, 3, print)._measured("sums", case)
    assert result.problem == problem
    assert result.facts == ({"sum": (3.0, 3.0)} if not problem else result.facts)
    assert len(result.ours.seconds) == (0 if problem else 3)
    assert (problem or "numbers/s") in markdown([result])


def test_a_number_that_is_none_agrees_with_nothing() -> None:
    check_facts({"loss": (1.0, 1.00001)}, 1e-4)
    for wrong in ((float("nan"), 1.0), (1.0, float("nan")), (1.0, 1.001)):
        with pytest.raises(CaseError, match="loss"):
            check_facts({"loss": wrong}, 1e-4)


def test_ratios_are_of_pairs_and_of_work() -> None:
    ours, reference = Timed([1.0, 4.0, 2.0], 100, 30.0, 8.0), Timed([2.0, 8.0, 4.0], 200, 15.0, 4.0)
    result = Result("a", "b", "tokens", 16.0, 2, {}, ours, reference)
    assert result.ratios == [4.0, 4.0, 4.0]  # twice the work in half the time
    assert result.memory_ratio == 0.5
    assert result.shares_of_peak == (8 / 2 / 16 / 2, 4 / 4 / 16)
    assert "| 15 tokens/s (7.5 to 30) | 3.75 tokens/s (1.88 to 7.5) | 4 (4 to 4) |" in markdown([result])


def test_sizes_are_changed_by_name() -> None:
    changed = changed_sizes(QUICK, ["layers=3", "microbatches=[1,2,3]"])
    assert (changed.layers, changed.microbatches) == (3, (1, 2, 3))
    with pytest.raises(UserError) as wrong:
        changed_sizes(QUICK, ["layer=3", "heads=0"])
    assert "did you mean layers?" in str(wrong.value)
    assert "heads=0: Input should be" in str(wrong.value)
    with pytest.raises(UserError, match=r"^heads=7: hidden_size must be.*; sequence_length=100: must be"):
        changed_sizes(QUICK, ["heads=7", "kv_heads=7", "sequence_length=100"])


def test_a_wrong_name_is_refused_with_the_nearest() -> None:
    command = [sys.executable, "tools/bench.py", "longred_stop", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "longred_stop: no such comparison; did you mean longred_step?" in ended.stderr


@pytest.mark.parametrize("repeats", [0, 1001])
def test_repeats_have_limits(repeats: int) -> None:
    with pytest.raises(UserError, match="--repeats"):
        Bench(QUICK, repeats, print)
