"""The launch scripts, as far as one machine goes: two agents over loopback, and Slurm with a stand-in for `srun`."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.training.workspace import make_workspace, read_metrics

LAUNCH = Path(__file__).parents[1] / "tools" / "launch"
# Starts as many ranks as Slurm would, with the numbers Slurm would give them, and passes signals on.
SRUN = """#!/bin/bash
shift
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
    until wait "$pid"; do code=$?; kill -0 "$pid" 2>/dev/null || { status=$code; break; }; done
done
exit $status
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command: list[Any], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_nodes_train_what_one_process_does(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"steps": 2})
    common = {"NODES": "2", "RANKS": "1", "PORT": free_port()}
    command = ["sh", LAUNCH / "torchrun.sh", recipe, f"run.dir={tmp_path}/two"]
    agents = [start(command, **common, NODE_RANK=str(rank)) for rank in range(2)]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert "ranks       2 on 1 machines" in outputs[0] and "all-reduce  64 MiB" in outputs[0]
    one = start([sys.executable, "-m", "longred_megatron.train", recipe, f"run.dir={tmp_path}/one"])
    assert one.wait(timeout=300) == 0
    for alone, both in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def test_slurm_script_trains_and_saves_when_time_is_up(tmp_path: Path) -> None:
    recipe = make_workspace(tmp_path, training={"steps": 10_000})
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = start(
        ["bash", LAUNCH / "slurm.sbatch", recipe, f"run.dir={tmp_path}/run"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_NTASKS="2",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_SUBMIT_DIR=str(LAUNCH.parents[1]),
        PORT=free_port(),
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    for srun in subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split():
        os.kill(int(srun), signal.SIGTERM)  # which passes it to every rank
    output, _ = job.communicate(timeout=200)
    assert "ranks       2 on 1 machines" in output
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{read_metrics(tmp_path / 'run')[-1]['step']:06}", output
    assert job.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_usage_without_a_recipe(script: str) -> None:
    done = subprocess.run(["bash", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 2 and "recipe" in done.stderr.lower()


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
@pytest.mark.parametrize("port", [None, "http", "99999"], ids=["busy", "a word", "too large"])
def test_a_port_that_cannot_be_listened_on(script: str, port: str | None, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tmp_path / "scontrol").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = port or str(busy.getsockname()[1])
        slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node0", "SLURM_SUBMIT_DIR": str(LAUNCH.parents[1])}
        path = f"{tmp_path}:{os.environ['PATH']}"
        job = start(["bash", LAUNCH / script, "recipe.yaml"], **slurm, PATH=path, PORT=port, RANKS="1")
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and output.startswith(f"error: PORT {port}: is in use on") and output.count("\n") == 1


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_environment", LAUNCH / "check_environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_check_names_what_differs(check: ModuleType) -> None:
    own = check.describe()
    assert check.problems([own, own]) == []
    gpu = {"gpu": "H100, 80 GiB", "versions": own["versions"] | {"transformer-engine": "2.20", "torch": "2.0"}}
    other = own | {"host": "node1"} | gpu
    [torch_differs, engine_differs, gpus_differ] = check.problems([own, other])
    assert "torch differs" in torch_differs and "node1" in torch_differs
    assert "transformer-engine differs" in engine_differs and "H100" in gpus_differ
    [blind] = check.problems([own | {"driver": True}])
    assert "torch sees no GPU" in blind
