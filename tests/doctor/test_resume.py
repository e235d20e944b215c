"""What a resumed run loses is found, by what it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longred_megatron.doctor.findings import Finding
from longred_megatron.doctor.resume import judge_state, judge_steps, six_steps, three_more
from tests.doctor import faults
from tests.doctor.ranks import Fault, on_ranks


def findings(path: Path, folder: Path, fault: Fault | None = None) -> list[Finding]:
    [straight] = on_ranks(1, six_steps, folder, path, folder / "checkpoint", folder)
    [resumed] = on_ranks(1, three_more, folder, path, folder / "checkpoint", folder, fault=fault)
    hosts = ["here"]
    return [judge_state([straight], [resumed], "fp32", hosts), judge_steps([straight], [resumed], "fp32", hosts)]


def test_the_clean_tree_resumes_to_the_last_bit(small: Callable[..., Path], tmp_path: Path) -> None:
    state, steps = findings(small(), tmp_path)
    assert (state.status, steps.status) == ("ok", "ok")
    assert "weight, param, exp_avg, exp_avg_sq" in state.text and "to the last bit" in steps.text


@pytest.mark.parametrize(
    ("fault", "statuses", "names"),
    [
        (faults.moments_lost, ("wrong", "wrong"), "exp_avg, exp_avg_sq"),
        (faults.steps_lost, ("ok", "wrong"), ""),
    ],
)
def test_a_loss_is_found(
    fault: Fault, statuses: tuple[str, str], names: str, small: Callable[..., Path], tmp_path: Path
) -> None:
    state, steps = findings(small(), tmp_path, fault)
    assert (state.status, steps.status) == statuses
    assert names in state.text
