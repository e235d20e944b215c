"""What is said of machines, from what their ranks report: no GPU is here to ask."""

from pathlib import Path
from typing import Any

import pytest

from longred_megatron.doctor import environment, links, real_widths
from longred_megatron.doctor.findings import Finding
from longred_megatron.planning.gpus import gpu_of_card, read_gpu
from longred_megatron.planning.plan import plan_phase
from longred_megatron.recipe import load_recipe, read_phases
from tests.training.workspace import make_workspace

SMI = dict.fromkeys(environment.SMI, "0") | {"driver_version": "580.1", "clocks.max.sm": "1980"}


def gpu_rank(index: int = 0, **changes: Any) -> dict[str, Any]:
    known = {
        "host": "node0",
        "versions": {"torch": "2.13.0", "transformer-engine": "2.20.2"},
        "libraries": {"cuda": "13.0", "cudnn": "92000", "nccl": "2.28.9"},
        "local_rank": index,
        "driver": True,
        "visible": True,
        "gpu": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 80 * 2**30,
        "capability": "9.0",
        "apex": "",
        "smi": SMI,
    }
    return known | changes


def of_gpus(*ranks: dict[str, Any]) -> dict[str, Finding]:
    return {f.name: f for f in [environment.versions(ranks), *environment.devices(ranks)]}


def test_machines_that_are_alike() -> None:
    found = of_gpus(gpu_rank(0), gpu_rank(1))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["GPUs"].text == "2 x NVIDIA H100 80GB HBM3, 80 GiB, capability 9.0"


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"versions": {"torch": "2.12.0", "transformer-engine": "2.20.2"}}, "software", "torch differs"),
        ({"libraries": {"cuda": "13.0", "cudnn": "91900", "nccl": "2.28.9"}}, "software", "cudnn differs"),
        ({"gpu": "NVIDIA A100"}, "GPUs", "the ranks' GPUs differ"),
        ({"local_rank": 0}, "a GPU a rank", "several ranks take GPU 0 of node0"),
        ({"smi": SMI | {"driver_version": "570.0"}}, "driver, clocks and memory errors", "drivers differ"),
        (
            {"smi": SMI | {"ecc.errors.uncorrected.volatile.total": "3"}},
            "driver, clocks and memory errors",
            "rank 1 on node0 (3 uncorrected errors)",
        ),
    ],
)
def test_a_machine_that_is_not(changes: dict[str, Any], name: str, expected: str) -> None:
    found = of_gpus(gpu_rank(0), gpu_rank(1, **changes))
    assert {n for n, finding in found.items() if finding.status == "wrong"} == {name}
    assert expected in found[name].text and found[name].change


def test_what_does_not_answer_is_not_tried() -> None:
    found = of_gpus(gpu_rank(0, smi={}, apex="ModuleNotFoundError: No module named 'x'"))
    assert found["driver, clocks and memory errors"].status == found["apex"].status == "not tried"


def test_a_slow_group_is_named_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, hosts = {(0, 1): 200e9, (2, 3): 190e9, (4, 5): 20e9}, ["a", "a", "b", "b", "c", "c"]
    assert links.judge("tensor", rates, hosts).status == "ok"  # CPU ranks share cores
    monkeypatch.setattr(links, "on_gpu", lambda: True)
    found = links.judge("tensor", rates, hosts)
    assert found.status == "wrong" and "ranks 4, 5 on c: 20.00 GB/s" in found.text
    assert links.judge("tensor", {(0, 1): 200e9, (2, 3): 190e9}, hosts).status == "ok"


def test_memory_beyond_the_plan_is_told_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [{"bytes": 10 * 2**30, "losses": {"loss": 1.0}}, {"bytes": 20 * 2**30, "losses": {"loss": 1.0}}]
    hosts = ["a", "b"]
    assert real_widths.judge_memory(ranks, 10 * 2**30, hosts).status == "ok"
    monkeypatch.setattr(real_widths, "on_gpu", lambda: True)
    assert real_widths.judge_memory(ranks, 18 * 2**30, hosts).status == "ok"
    found = real_widths.judge_memory(ranks, 10 * 2**30, hosts)
    assert found.status == "wrong" and "20.00 GiB on rank 1 on b" in found.text
    broken = [rank | {"losses": {"loss": float("nan")}} for rank in ranks]
    assert real_widths.judge_memory(broken, 30 * 2**30, hosts).status == "wrong"


def test_time_stands_beside_the_plan(tmp_path: Path) -> None:
    [phase] = read_phases(load_recipe(make_workspace(tmp_path), ["precision.params=bf16"]))
    ranks = [{"seconds": [9.0, 2.0], "peak_flops": 989e12}, {"seconds": [9.0, 3.0], "peak_flops": 989e12}]
    planned = plan_phase(phase, 2, read_gpu("h100-80gb")).step_seconds
    found = real_widths.judge_time(ranks, phase, ("NVIDIA H100 80GB HBM3", 85.0e9))
    assert found.numbers["planned_step_seconds"] == planned
    assert found.text.startswith("3.0 s a step") and found.text.endswith(f"tools/plan.py expects {planned:.1f} s")
    assert "no plan for NVIDIA X1" in real_widths.judge_time(ranks, phase, ("NVIDIA X1", 85.0e9)).text
    assert "plan" not in real_widths.judge_time(ranks, phase, None).text


@pytest.mark.parametrize(
    ("card", "gigabytes", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 42.5, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "a100-80gb"),
        ("NVIDIA GB200", 198.0, "gb200-186gb"),
        ("NVIDIA B200", 191.5, "b200-180gb"),
        ("NVIDIA H100 NVL", 100.0, None),
        ("NVIDIA H100 PCIe", 85.0, None),
        ("NVIDIA A100-PCIE-40GB", 42.5, None),
    ],
)
def test_a_card_is_known_by_its_name_and_memory(card: str, gigabytes: float, name: str | None) -> None:
    assert gpu_of_card(card, gigabytes * 1e9) == (read_gpu(name) if name else None)
