"""The machines and their software, over all ranks: what differs, what is missing, and the disk of run.dir."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Finding, not_tried
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.team import Report
from longred_megatron.errors import plain
from longred_megatron.recipe import Recipe, read_phases

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "longred-megatron")
# What nvidia-smi is asked for. A GPU that cools itself down or is capped runs below its largest clock under load.
SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "power.limit",
    "ecc.errors.uncorrected.volatile.total",
)
APEX = "fused_weight_gradient_mlp_cuda"
DISK_BYTES = {True: 2**30, False: 2**25}  # written by each rank, on a GPU and on a CPU
SECONDS = 120.0


def check(patient: Patient) -> Iterator[Finding]:
    """Software and GPUs of all ranks are alike; Transformer Engine and apex can be used; the disk holds the run."""
    ranks = patient.team.run(describe, seconds=SECONDS)
    yield versions(ranks)
    yield from devices(ranks) if on_gpu() else [_no_gpu(ranks)]
    if on_gpu():
        [choices] = patient.team.run(attention, patient.recipe, seconds=SECONDS, alone=True)
        yield _attention(choices)
    yield _disk(patient)


def describe(report: Report) -> dict[str, Any]:
    """This rank's machine and software. Runs in a process of its own."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    known: dict[str, Any] = {
        "host": platform.node(),
        "versions": found,
        "driver": shutil.which("nvidia-smi") is not None,
        "visible": torch.cuda.is_available(),
        "gpu": None,
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
    }
    if on_gpu():
        report("reading the GPU's properties")
        known |= _gpu(known["local_rank"])
    return known


def _gpu(index: int) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(index)
    versions = {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
    return {
        "gpu": card.name,
        "memory_bytes": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "libraries": versions,
        "apex": _why_not(APEX),
        "smi": _nvidia_smi(str(getattr(card, "uuid", index))),
    }


def _why_not(module: str) -> str:
    """Why a module cannot be imported; empty: it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a compiled module that does not fit raises anything
        return plain(f"{type(error).__name__}: {error}")[:200]
    return ""


def _nvidia_smi(device: str) -> dict[str, str]:
    """The driver's own figures of one GPU; empty where it does not answer. device: its UUID, or its number."""
    name = device if device.isdigit() or device.startswith("GPU-") else f"GPU-{device}"
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in line.split(",")]
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) else {}


def attention(report: Report, recipe: Recipe) -> list[tuple[str, bool]]:
    """What Transformer Engine's attention does with each objective's calls, in words; and whether it takes them."""
    from longred_megatron.model.attention_backends import attention_choices  # needs Transformer Engine

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    choices = dict.fromkeys(choice for phase in read_phases(recipe) for choice in attention_choices(phase))
    return [(str(choice), choice.backend is not None) for choice in choices]


def _attention(choices: Sequence[tuple[str, bool]]) -> Finding:
    text = "; ".join(what for what, _ in choices)
    if all(taken for _, taken in choices):
        return Finding("attention backends", "ok", text)
    change = "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 makes Transformer Engine print why; use bf16, and another cuDNN"
    return Finding("attention backends", "wrong", text, change)


def versions(ranks: Sequence[dict[str, Any]]) -> Finding:
    """Whether all ranks run the same software."""
    differing = _differing([rank["versions"] | rank.get("libraries", {}) for rank in ranks], ranks)
    if differing:
        return Finding("software", "wrong", "; ".join(differing), "install the same versions on every machine")
    own = ranks[0]["versions"] | ranks[0].get("libraries", {})
    hosts = sorted({rank["host"] for rank in ranks})
    where = f"{len(ranks)} ranks on {len(hosts)} machines" if len(ranks) > 1 else f"one process on {hosts[0]}"
    shown = ", ".join(f"{name} {version}" for name, version in own.items())
    return Finding("software", "ok", f"{where}: {shown}", numbers={"hosts": hosts, "versions": own})


def _differing(own: Sequence[dict[str, str]], ranks: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for name in own[0]:
        used = {each.get(name, "none"): rank["host"] for each, rank in zip(own, ranks, strict=True)}
        if len(used) > 1:
            listing = ", ".join(f"{version} on {host}" for version, host in sorted(used.items()))
            found.append(f"{name} differs between ranks ({listing})")
    return found


def _no_gpu(ranks: Sequence[dict[str, Any]]) -> Finding:
    """GPU, Transformer Engine, apex and clocks of a machine that computes on its CPU."""
    if unused := sorted({rank["host"] for rank in ranks if rank["visible"] and not os.environ.get("LONGRED_DEVICE")}):
        return Finding(
            "GPUs",
            "wrong",
            f"there are GPUs on {', '.join(unused)}, but Transformer Engine cannot be imported there",
            "install it (pip install -e '.[gpu]', or docker/), or set LONGRED_DEVICE=cpu to mean the CPU",
        )
    if blind := sorted({rank["host"] for rank in ranks if rank["driver"] and not rank["visible"]}):
        return Finding(
            "GPUs",
            "wrong",
            f"nvidia-smi is there, but torch sees no GPU on {', '.join(blind)}",
            "check the driver, CUDA_VISIBLE_DEVICES and the container's --gpus",
        )
    return not_tried("GPUs, Transformer Engine, apex, clocks", "no GPU is used; all that follows ran on the CPU")


def devices(ranks: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """The GPUs, what the driver says of them, and the two packages that were compiled for them."""
    kinds = {f"{r['gpu']}, {r['memory_bytes'] / 2**30:.0f} GiB, capability {r['capability']}": r["host"] for r in ranks}
    if len(kinds) > 1:
        listing = "; ".join(f"{kind} on {host}" for kind, host in sorted(kinds.items()))
        yield Finding(
            "GPUs", "wrong", f"the ranks' GPUs differ: {listing}", "take nodes of one kind: the slowest sets the pace"
        )
    else:
        yield Finding("GPUs", "ok", f"{len(ranks)} x {next(iter(kinds))}")
    yield _shared_gpus(ranks)
    yield _driver(ranks)
    if missing := {rank["apex"]: rank["host"] for rank in ranks if rank["apex"]}:
        listing = "; ".join(f"{why} on {host}" for why, host in missing.items())
        yield not_tried("apex", f"its fused weight gradient cannot be imported, and is not used: {listing}")
    else:
        yield Finding("apex", "ok", f"{APEX} can be imported on every rank")


def _shared_gpus(ranks: Sequence[dict[str, Any]]) -> Finding:
    places = [(rank["host"], rank["local_rank"]) for rank in ranks]
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        listing = ", ".join(f"GPU {index} of {host}" for host, index in twice)
        return Finding("a GPU a rank", "wrong", f"several ranks take {listing}", "start one rank a GPU")
    return Finding("a GPU a rank", "ok", "no two ranks share one")


def _driver(ranks: Sequence[dict[str, Any]]) -> Finding:
    """Driver, memory errors and clocks."""
    answered = [(i, rank) for i, rank in enumerate(ranks) if rank["smi"]]
    if not answered:
        return not_tried("driver, clocks and memory errors", "nvidia-smi does not answer in this environment")
    drivers = {rank["smi"]["driver_version"]: rank["host"] for _, rank in answered}
    broken = [
        f"rank {i} on {rank['host']} ({count} uncorrected errors)"
        for i, rank in answered
        if (count := rank["smi"]["ecc.errors.uncorrected.volatile.total"]).isdigit() and int(count)
    ]
    numbers = {f"rank {i}": rank["smi"] for i, rank in answered}
    if broken:
        text, change = (
            f"memory errors of the GPU: {', '.join(broken)}",
            "take that GPU out: its numbers are not to be trusted",
        )
        return Finding("driver, clocks and memory errors", "wrong", text, change, numbers)
    if len(drivers) > 1:
        text = "drivers differ: " + ", ".join(f"{version} on {host}" for version, host in sorted(drivers.items()))
        return Finding("driver, clocks and memory errors", "wrong", text, "install one driver everywhere", numbers)
    smi = answered[0][1]["smi"]
    text = f"driver {smi['driver_version']}, largest clock {smi['clocks.max.sm']} MHz, no uncorrected memory errors"
    return Finding("driver, clocks and memory errors", "ok", text, numbers=numbers)


def _disk(patient: Patient) -> Finding:
    """Whether all ranks see one disk at run.dir, how fast they write to it together, and whether the run fits."""
    team, recipe = patient.team, patient.recipe
    seen = team.gather(patient.shared.is_dir())
    if not all(seen):
        blind = ", ".join(f"rank {i} on {team.hosts[i]}" for i, sees in enumerate(seen) if not sees)
        return Finding(
            "disk of run.dir",
            "wrong",
            f"{patient.shared.parent} of rank 0 on {team.hosts[0]} is another folder on {blind}",
            "set run.dir to a folder that all machines share: every rank writes its part of a checkpoint there",
        )
    seconds = team.gather(_written(patient.shared / f"disk-{team.rank}", DISK_BYTES[on_gpu()]))
    rate, free = team.size * DISK_BYTES[on_gpu()] / max(seconds), shutil.disk_usage(patient.shared).free
    trained = patient.phases[0].source.num_parameters()
    checkpoint = trained * (recipe.precision.number_bytes + recipe.precision.optimizer_bytes)
    needed = (recipe.training.keep_checkpoints + 1) * checkpoint  # one more while the newest is written
    free, needed_text = team.first(free), f"{needed / 1e9:.1f} GB"
    numbers = {"bytes_per_second": rate, "free_bytes": free, "checkpoint_bytes": checkpoint, "needed_bytes": needed}
    text = (
        f"{free / 1e9:.0f} GB free; training.keep_checkpoints={recipe.training.keep_checkpoints} and one more need "
        f"{needed_text}; all ranks together write {rate / 1e9:.2f} GB/s, a checkpoint in {checkpoint / rate:.0f} s"
    )
    if free < needed:
        change = f"free space, or lower training.keep_checkpoints, or set run.dir to a disk with {needed_text} free"
        return Finding("disk of run.dir", "wrong", text, change, numbers)
    return Finding("disk of run.dir", "ok", text, numbers=numbers)


def _written(path: Path, num_bytes: int) -> float:
    """Seconds to write so many bytes down to the disk."""
    block = os.urandom(2**20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds
