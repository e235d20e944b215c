"""One decision about the device: a GPU and an importable Transformer Engine, or the CPU."""

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from longred_megatron.device import cpu_is_forced
from longred_megatron.errors import UserError
from longred_megatron.parallel.groups import _check_same_device
from longred_megatron.parallel.local_ranks import run_ranks
from tests.training.workspace import make_workspace, read_metrics

ROOT = Path(__file__).resolve().parent.parent
# Answers as on a machine with one GPU. No kernel can run on it: whoever takes it for true fails.
WITH_GPU = """
    import torch
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
"""
ASK = """
    import importlib.util, sys
    import longred_megatron
    from megatron.core.optimizer import clip_grads
    from longred_megatron.device import GPU_PACKAGES, on_gpu
    found = [name for name in GPU_PACKAGES if importlib.util.find_spec(name)]
    print(on_gpu(), found, clip_grads.l2_norm_impl.__module__)
"""
TRAIN = """
    import sys
    from longred_megatron.train import main
    main(sys.argv[1:])
"""


def python(code: str, *arguments: object, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process whose environment forces nothing."""
    inherited = {name: value for name, value in os.environ.items() if name != "LONGRED_DEVICE"}
    inherited["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def transformer_engine(tmp_path: Path) -> Path:
    """A folder with packages of those names, as Megatron imports them. Their functions cannot run anywhere."""
    packages = tmp_path / "packages"
    for name, text in {
        "transformer_engine/__init__.py": "__version__ = '2.20.2'",
        "transformer_engine/pytorch/__init__.py": "",
        "transformer_engine/pytorch/optimizers.py": "multi_tensor_applier = multi_tensor_scale = multi_tensor_l2norm = "
        "FusedAdam = FusedSGD = None",
        "apex/__init__.py": "",
        "amp_C.py": "",
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    return packages


def test_transformer_engine_without_a_gpu_stays_out_of_megatron(transformer_engine: Path) -> None:
    answer = python(ASK, path=transformer_engine)
    assert answer.stdout.startswith("False [] megatron."), answer


def test_the_cpu_can_be_forced_where_both_are_there(transformer_engine: Path) -> None:
    answer = python(WITH_GPU + ASK, path=transformer_engine, LONGRED_DEVICE="cpu")
    assert answer.stdout.startswith("False [] megatron."), answer


def test_a_gpu_with_transformer_engine_is_used(transformer_engine: Path) -> None:
    answer = python(
        WITH_GPU + "\n    from longred_megatron.device import on_gpu\n    print(on_gpu())", path=transformer_engine
    )
    assert answer.stdout == "True\n", answer


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'transformer_engine'"),
        OSError("libcudart.so.13: cannot open shared object"),
    ],
    ids=["missing", "not for this machine"],
)
def test_a_gpu_without_transformer_engine_trains_on_the_cpu_and_says_so(
    tmp_path: Path, transformer_engine: Path, error: Exception
) -> None:
    (transformer_engine / "transformer_engine/pytorch/__init__.py").write_text(f"raise {error!r}")
    recipe = make_workspace(tmp_path)
    trained = python(WITH_GPU + TRAIN, recipe, "training.steps=1", path=transformer_engine)
    assert trained.returncode == 0, trained.stderr
    assert len(read_metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "hf").is_dir()
    assert f"warning: there is a GPU, but Transformer Engine cannot be imported ({error})" in trained.stderr


def test_a_rehearsal_computes_on_the_cpu_also_beside_a_gpu(tmp_path: Path, transformer_engine: Path) -> None:
    rehearsed = python(WITH_GPU + TRAIN, make_workspace(tmp_path), "--rehearse", path=transformer_engine)
    assert rehearsed.returncode == 0 and "rehearsed in" in rehearsed.stdout, rehearsed.stderr


def test_another_value_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGRED_DEVICE", "gpu")
    with pytest.raises(UserError, match="LONGRED_DEVICE='gpu': set it to cpu"):
        cpu_is_forced()


def tell(join: Any, folder: Path) -> None:
    join("world")
    rank = torch.distributed.get_rank()
    for number, gpu in enumerate((True, rank != 1)):
        try:
            _check_same_device(gpu)
            said = "none"
        except UserError as error:
            said = str(error)
        (folder / f"{number}-{rank}").write_text(said)


def test_ranks_on_different_devices_are_told_at_the_start(tmp_path: Path) -> None:
    run_ranks(tell, 3, tmp_path)
    assert {(tmp_path / f"0-{rank}").read_text() for rank in range(3)} == {"none"}
    [said] = {(tmp_path / f"1-{rank}").read_text() for rank in range(3)}
    assert said.startswith(f"rank 1 on {platform.node()}: no GPU, or no Transformer Engine")
