"""A layout that does not compute what one rank does is found, and so is one rank that is not transformers' model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.doctor.parity import in_the_layout, judge, on_one_rank
from tests.doctor import faults
from tests.doctor.ranks import Fault, on_ranks


def layout(path: Path, folder: Path, num_ranks: int, fault: Fault | None = None) -> dict[str, Any]:
    on_ranks(num_ranks, in_the_layout, folder, path, folder / "layout", fault=fault)
    [found] = on_ranks(1, on_one_rank, folder, path, folder / "layout", True)
    return found


def statuses(found: dict[str, Any]) -> tuple[str, str]:
    one, other = (judge(key, found[key], found["limits"], "change") for key in ("one", "layout"))
    print(one.text, other.text, sep="\n")
    return one.status, other.status


@pytest.mark.parametrize("parallel", ["tensor", "context", "data"])
def test_the_clean_tree_agrees(parallel: str, small: Callable[..., Path], tmp_path: Path) -> None:
    path = small(*([] if parallel == "data" else [f"parallel.{parallel}=2"]))
    found = layout(path, tmp_path, 2)
    assert statuses(found) == ("ok", "ok")
    assert {"loss/long_text", "step 2: loss/long_text", "grad_norm"} < found["layout"].keys()
    assert sum(name.startswith("gradient of") for name in found["layout"]) > 30


def test_a_lost_reduction_is_a_fault_of_the_layout_alone(small: Callable[..., Path], tmp_path: Path) -> None:
    found = layout(small("parallel.tensor=2"), tmp_path, 2, faults.tensor_reduction_lost)
    assert statuses(found) == ("ok", "wrong")


def test_a_wrong_mask_is_a_fault_of_one_rank(small: Callable[..., Path], tmp_path: Path) -> None:
    path = small("objectives.short_to_long=null", "objectives.short_restoration=null")
    [found] = on_ranks(1, on_one_rank, tmp_path, path, tmp_path, False, fault=faults.future_seen)
    assert judge("name", found["one"], found["limits"], "change").status == "wrong"
