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

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "tools" / "launch"
# Starts as many ranks as Slurm would, with the numbers Slurm would give them, and passes signals on. Its own flags it
# writes down: a line a call.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do flags+=" $1"; shift; done
echo "$flags" >> "${SRUN_FLAGS:-/dev/null}"
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
    until wait "$pid"; do code=$?; kill -0 "$pid" 2>/dev/null || { status=$code; break; }; done
done
exit $status
"""

SCONTROL = "#!/bin/sh\necho 127.0.0.1\n"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def programs(folder: Path, **texts: str) -> str:
    """Writes programs and returns a PATH on which they come first."""
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


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
    path = programs(tmp_path, srun=SRUN, scontrol=SCONTROL)
    job = start(
        ["bash", LAUNCH / "slurm.sbatch", recipe, f"run.dir={tmp_path}/run"],
        PATH=path,
        SLURM_NTASKS="2",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_SUBMIT_DIR=str(ROOT),
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
    path = programs(tmp_path, scontrol=SCONTROL)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = port or str(busy.getsockname()[1])
        slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node0", "SLURM_SUBMIT_DIR": str(ROOT)}
        job = start(["bash", LAUNCH / script, "recipe.yaml"], **slurm, PATH=path, PORT=port, RANKS="1")
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and output.startswith(f"error: PORT {port}: is in use on") and output.count("\n") == 1


# What a rank is given, in place of Python: a line for each that is started.
RANK = """#!/bin/sh
case "$1" in -c) exit 0 ;; esac
echo $(env | grep -E '^(CUDA_DEVICE|PYTORCH_ALLOC|[A-Z]+_SOCKET)' | sort) >> "$SEEN"
"""


@pytest.mark.parametrize("way", ["torchrun", "slurm", "container", "entrypoint"])
def test_every_way_to_start_reads_the_one_environment(way: str, tmp_path: Path) -> None:
    path = programs(tmp_path, rank=RANK, python=RANK, srun=SRUN, scontrol=SCONTROL)
    entrypoint = (ROOT / "docker/entrypoint.sh").read_text().replace("/opt/longred-megatron", str(ROOT))
    programs(tmp_path, entrypoint=entrypoint)
    commands: dict[str, list[Any]] = {
        "torchrun": ["sh", LAUNCH / "torchrun.sh", "recipe.yaml"],
        "slurm": ["bash", LAUNCH / "slurm.sbatch", "recipe.yaml"],
        "container": ["bash", LAUNCH / "slurm.sbatch", "recipe.yaml"],
        "entrypoint": [tmp_path / "entrypoint", tmp_path / "rank", "train"],
    }
    seen, flags = tmp_path / "seen", tmp_path / "flags"
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node0", "SLURM_SUBMIT_DIR": str(ROOT), "PORT": free_port()}
    own = {"PATH": path, "PYTHON": str(tmp_path / "rank"), "SEEN": str(seen), "SRUN_FLAGS": str(flags)}
    job = start(commands[way], **slurm, **own, INTERFACE="eth9", IMAGE="x.sqsh" if way == "container" else "")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    expected = (
        "CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=eth9 NCCL_SOCKET_IFNAME=eth9 "
        "PYTORCH_ALLOC_CONF=expandable_segments:True"
    )
    ranks = {"torchrun": 2, "slurm": 4, "container": 4, "entrypoint": 1}[way]  # the check of the environment, the run
    assert seen.read_text().splitlines() == [expected] * ranks
    if way == "container":
        mounted = f"--container-image=x.sqsh --container-mounts={ROOT}:{ROOT} --container-workdir={ROOT}"
        assert flags.read_text().splitlines() == [f" --kill-on-bad-exit=1 {mounted}"] * 2


def test_what_is_set_already_stays(tmp_path: Path) -> None:
    script = f'. {LAUNCH}/environment.sh; echo "$CUDA_DEVICE_MAX_CONNECTIONS ${{NCCL_SOCKET_IFNAME-none}}"'
    job = start(["sh", "-euc", script], CUDA_DEVICE_MAX_CONNECTIONS="32", INTERFACE="")
    assert job.communicate()[0] == "32 none\n"


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
