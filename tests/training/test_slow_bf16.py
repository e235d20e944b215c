"""A run in bf16 says at its start when the CPU has no instructions for it."""

from pathlib import Path

import pytest

from longred_megatron import device
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.train import _announce
from longred_megatron.training.microbatches import open_data
from tests.training.workspace import make_workspace


@pytest.mark.parametrize(
    ("params", "slow", "told"), [("bf16", True, True), ("bf16", False, False), ("fp32", True, False)]
)
def test_the_start_of_a_run(
    params: str,
    slow: bool,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device, "bf16_is_slow", lambda: slow)
    recipe = load_recipe(make_workspace(tmp_path), [f"precision.params={params}"])
    phases = read_phases(recipe)
    _announce(recipe, phases, open_data(phases), 1)
    assert ("bf16 is slow" in capsys.readouterr().out) == told


def test_x86_without_avx_512_is_slow() -> None:
    cpu = Path("/proc/cpuinfo")
    if not cpu.is_file() or " avx" not in cpu.read_text():
        pytest.skip("knows x86 alone")
    assert device.bf16_is_slow() == (" avx512bw" not in cpu.read_text())
