"""Both images, really built and run: `make docker-check`. Skipped where that has not been asked for, or has no engine.

LONGRED_DOCKER_BASE       base of the CPU image
LONGRED_DOCKER_CUDA_BASE  base of the GPU image; without it that one, which compiles for long, is not built
LONGRED_DOCKER_BUILD      more words for `docker build`, such as --network host or --build-arg MAX_JOBS=2
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from longred_megatron import __version__
from tests.training.workspace import make_workspace, read_metrics

ROOT = Path(__file__).parents[2]
PROJECT = "/opt/longred-megatron"  # in the images
TRAIN = ["python", "-m", "longred_megatron.train"]
# Somebody whom neither the images nor, if this machine lets us choose, their base know.
CALLER = 12345 if os.geteuid() == 0 else os.geteuid()


def docker(*words: object, timeout_seconds: float = 600, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["docker", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
    )
    assert not check or done.returncode == 0, f"docker {shlex.join(map(str, words))}\n{done.stdout}"
    return done


def run_words(image: str, folder: Path | None = None, *, network: str = "none") -> list[object]:
    """`docker run` as CALLER, with a folder mounted on /work."""
    mount = ["--volume", f"{folder}:/work"] if folder else []
    return ["run", "--rm", "--init", "--network", network, "--user", f"{CALLER}:{CALLER}", *mount, image]


def build(file: str, base: str, tag: str) -> str:
    """Builds an image and returns its name. Its output is printed: `make docker-check` shows it."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    values = [base, f"VERSION={__version__}", f"REVISION={revision}"]
    flags = [word for value in values for word in ("--build-arg", value)]
    extra = shlex.split(os.environ.get("LONGRED_DOCKER_BUILD", ""))
    command = ["docker", "build", "--file", f"docker/{file}", "--tag", tag, *flags, *extra, "."]
    subprocess.run(command, cwd=ROOT, check=True, timeout=4 * 3600)
    return tag


@pytest.fixture(scope="session")
def asked() -> None:
    if "LONGRED_DOCKER_BASE" not in os.environ:
        pytest.skip("only in `make docker-check`: it reaches the network, and takes gigabytes")


@pytest.fixture(scope="session")
def engine(asked: None) -> None:
    if shutil.which("docker") is None or docker("version", check=False).returncode:
        pytest.skip("no Docker engine answers")


@pytest.fixture(scope="session")
def cpu(engine: None) -> str:
    return build("Dockerfile.cpu", f"BASE_IMAGE={os.environ['LONGRED_DOCKER_BASE']}", "longred-megatron:check-cpu")


@pytest.fixture(scope="session")
def gpu(engine: None) -> str:
    if not (base := os.environ.get("LONGRED_DOCKER_CUDA_BASE")):
        pytest.skip("LONGRED_DOCKER_CUDA_BASE names no base for the GPU image, which compiles for an hour")
    return build("Dockerfile.gpu", f"CUDA_IMAGE={base}", "longred-megatron:check-gpu")


@pytest.fixture(params=["cpu", "gpu"])
def image(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def caller_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mounted"
    folder.mkdir()
    return folder


def give_to_caller(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, CALLER, CALLER)


def workspace(folder: Path, **training: Any) -> None:
    make_workspace(folder, training=training)
    give_to_caller(folder)


def test_what_an_image_says_of_itself(image: str) -> None:
    config = json.loads(docker("inspect", image).stdout)[0]["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels.keys() == {"title", "description", "licenses", "version", "revision"}
    assert labels["version"] == __version__ and labels["revision"] != "unknown" and config["User"] == "1000:1000"
    health = docker("run", "--rm", "--network", "none", image, *config["Healthcheck"]["Test"][1:])
    assert health.stdout == ""  # no training, nothing wrong
    launched = docker("run", "--rm", "--network", "none", image, "sh", "-c", "id -u; env").stdout.splitlines()
    assert launched[0] == "1000"
    assert {"CUDA_DEVICE_MAX_CONNECTIONS=1", "PYTORCH_ALLOC_CONF=expandable_segments:True"} <= set(launched)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    """Version by name, as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def test_packages_are_those_of_the_constraints(image: str) -> None:
    listed = json.loads(docker(*run_words(image), "pip", "list", "--format=json").stdout.splitlines()[0])
    installed = {normal(package["name"]): package["version"] for package in listed}
    own = {"longred-megatron", "apex", "pip"}  # apex by its commit; pip is the base's
    assert {name: installed[name] for name in installed.keys() - own} == {
        name: version for name, version in pinned().items() if name in installed
    }


ANYBODY = """
import getpass, os, pathlib, torch
print(os.getuid(), getpass.getuser())
(pathlib.Path.home() / "a_file").touch()
import matplotlib.pyplot
print(torch.compile(lambda x: torch.nn.functional.gelu(x) * 2)(torch.ones(8)).shape)
"""


def test_anybody_has_a_home_and_a_compiler(image: str) -> None:
    words = run_words(image)
    name, *_, size = docker(*words, "python", "-W", "error::UserWarning", "-c", ANYBODY).stdout.splitlines()
    assert (name, size) == (f"{CALLER} longred", "torch.Size([8])")  # between them torch may say that there is no GPU


def test_a_run_belongs_to_its_caller(image: str, caller_folder: Path) -> None:
    """In the GPU image too: without a GPU it computes on the CPU."""
    workspace(caller_folder, steps=1)
    before = set(caller_folder.rglob("*"))
    docker(*run_words(image, caller_folder), *TRAIN, "recipe.yaml")
    made = set(caller_folder.rglob("*")) - before
    assert caller_folder / "run/hf/model.safetensors" in made
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(CALLER, CALLER)}


def test_a_folder_of_somebody_else_is_one_message(cpu: str, caller_folder: Path) -> None:
    make_workspace(caller_folder, training={"steps": 1})
    for path in [caller_folder, *caller_folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    user = ["--user", f"{CALLER + 1}:{CALLER + 1}"]
    done = docker(
        "run",
        "--rm",
        "--network",
        "none",
        *user,
        "-v",
        f"{caller_folder}:/work",
        cpu,
        *TRAIN,
        "recipe.yaml",
        check=False,
    )
    assert done.returncode == 2 and done.stdout.startswith("error: run.dir ") and "Traceback" not in done.stdout


FIRST_STEP = """
from tiny_runs import prepare_texts, train
prepare_texts()
train("recipes/tiny_longred_c.yaml", "training.steps=1")
"""


def test_the_demo_in_a_mounted_checkout(cpu: str, caller_folder: Path) -> None:
    """Its texts and the first step of its LongReD run; all of it takes minutes. Nothing but itself has to be reachable:
    without a network not even the container's own name is known."""
    for name in ("recipes", "tools", "tests/assets"):
        shutil.copytree(ROOT / name, caller_folder / name)
    give_to_caller(caller_folder)
    words = run_words(cpu, caller_folder)
    docker(*words, "sh", "-c", f"cd tools && python -c '{FIRST_STEP}'")
    assert [line["step"] for line in read_metrics(caller_folder / "runs/tiny_longred_c")] == [1]


@pytest.fixture
def network(engine: None) -> Iterator[str]:
    name = f"longred-check-{uuid4().hex[:8]}"
    docker("network", "create", "--internal", name)
    yield name
    docker("network", "rm", name)


def test_two_containers_are_two_nodes(cpu: str, network: str, caller_folder: Path) -> None:
    workspace(caller_folder, steps=2)
    names = [f"{network}-{rank}" for rank in range(2)]
    nodes = []
    for rank, name in enumerate(names):
        settings = {"NODES": 2, "NODE_RANK": rank, "RANKS": 1, "MASTER": names[0], "INTERFACE": "eth0"}
        environment = [word for key, value in settings.items() for word in ("--env", f"{key}={value}")]
        run, *rest = run_words(cpu, caller_folder, network=network)
        command = ["sh", f"{PROJECT}/tools/launch/torchrun.sh", "recipe.yaml", "run.dir=two"]
        words = [run, "--name", name, *environment, *rest, *command]
        nodes.append(
            subprocess.Popen(["docker", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "ranks       2 on 2 machines" in outputs[0]
    docker(*run_words(cpu, caller_folder), *TRAIN, "recipe.yaml", "run.dir=one")
    for alone, both in zip(read_metrics(caller_folder / "one"), read_metrics(caller_folder / "two"), strict=True):
        assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


@pytest.fixture
def endless(cpu: str, caller_folder: Path) -> Iterator[str]:
    """A container that trains, after its first steps."""
    workspace(caller_folder, steps=100_000)
    run, _, *rest = run_words(cpu, caller_folder)
    name = docker(run, "--detach", *rest, *TRAIN, "recipe.yaml").stdout.split()[-1]
    metrics, deadline = caller_folder / "run/metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.5)
    yield name
    docker("rm", "--force", name)


def test_docker_stop_saves_a_checkpoint(endless: str, caller_folder: Path) -> None:
    docker("stop", "--time", "300", endless)
    [checkpoint] = (caller_folder / "run/checkpoints").iterdir()
    assert checkpoint.name == f"step-{read_metrics(caller_folder / 'run')[-1]['step']:06}"
    assert json.loads(docker("inspect", endless).stdout)[0]["State"]["ExitCode"] == 128 + 15


STOP = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if (process / "cmdline").read_text().split("\\0")[1:3] == ["-m", "longred_megatron.train"]:
        os.kill(int(process.name), signal.SIGSTOP)
"""


def test_the_health_check_names_a_rank_that_stands(endless: str, caller_folder: Path) -> None:
    beat, deadline = caller_folder / "run/ranks/rank-00000.json", time.monotonic() + 60
    while "step" not in json.loads(beat.read_text())["doing"] and time.monotonic() < deadline:
        time.sleep(1)  # beats are seconds apart
    check = ["exec", endless, "python", f"{PROJECT}/docker/healthcheck.py"]
    assert docker(*check, check=False).returncode == 0
    docker("exec", endless, "python", "-c", STOP)
    time.sleep(65)
    done = docker(*check, check=False)
    assert done.returncode == 1 and re.match(r"rank 0 is silent for \d+ s, last at step \d+", done.stdout), done.stdout


COMPILED = """
import torch, transformer_engine.pytorch, transformer_engine_torch
import fused_weight_gradient_mlp_cuda, amp_C
print(transformer_engine_torch.__file__, callable(fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32))
"""


def test_compiled_parts_of_the_gpu_image_load(gpu: str) -> None:
    done = docker(*run_words(gpu), "python", "-c", COMPILED)
    assert done.stdout.splitlines()[-1].endswith(".so True")


def test_extras_bring_nothing_that_is_not_pinned(asked: None, tmp_path: Path) -> None:
    """Asks the package index, as every build does; of Transformer Engine's binding only the metadata is made."""
    report = tmp_path / "report.json"
    flags = ["--dry-run", "--ignore-installed", "--quiet", "--no-build-isolation", "--report", report]
    project = f"{ROOT}[dev,eval,gguf,gpu]"
    command = [sys.executable, "-m", "pip", "install", *flags, "--constraint", ROOT / "constraints.txt", project]
    subprocess.run([str(word) for word in command], check=True, timeout=1800)
    names = {normal(item["metadata"]["name"]) for item in json.loads(report.read_text())["install"]}
    assert names - pinned().keys() == {"longred-megatron"}
