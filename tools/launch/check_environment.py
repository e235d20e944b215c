#!/usr/bin/env python
"""Checks what a run needs before it takes the machines: versions, GPUs, and that all ranks reach each other.

Examples:
    python tools/launch/check_environment.py                                  this machine
    torchrun --nproc-per-node 8 tools/launch/check_environment.py             and between its ranks
Both launch scripts beside this file run it first. Exit code 2 if something is wrong, with what to do.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from datetime import timedelta
from typing import Any

import torch

from longred_megatron.errors import UserError, run_cli

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "longred-megatron")
MESSAGE_BYTES = 64 * 2**20
REPEATS = 5


def describe() -> dict[str, Any]:
    """This rank's machine and software."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    gpu = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))) if _has_gpu() else None
    return {
        "host": platform.node(),
        "versions": versions,
        "gpu": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else "none",
        "driver": shutil.which("nvidia-smi") is not None,
    }


def problems(ranks: list[dict[str, Any]]) -> list[str]:
    """What is wrong, over all ranks; each a sentence that says what to change."""
    found = []
    for name in ranks[0]["versions"]:
        used = {rank["versions"][name]: rank["host"] for rank in reversed(ranks)}
        if len(used) > 1:
            listing = ", ".join(f"{version} on {host}" for version, host in sorted(used.items()))
            found.append(f"{name} differs between ranks ({listing}): install the same version everywhere")
    if len({rank["gpu"] for rank in ranks}) > 1:
        listing = ", ".join(sorted({f"{rank['gpu']} on {rank['host']}" for rank in ranks}))
        found.append(f"the ranks' GPUs differ ({listing}): the slowest sets the pace; take nodes of one kind")
    blind = sorted({rank["host"] for rank in ranks if rank["driver"] and rank["gpu"] == "none"})
    if blind:
        found.append(f"nvidia-smi is there, but torch sees no GPU on {', '.join(blind)}: check driver and container")
    without_engine = any(r["gpu"] != "none" and r["versions"]["transformer-engine"] == "none" for r in ranks)
    if without_engine:
        found.append("transformer-engine is not installed: GPUs need it (pip install -e '.[gpu]', or docker/)")
    return found


def all_reduce_seconds() -> float:
    """The best of a few sums of MESSAGE_BYTES over the world, on the slowest rank."""
    device = "cuda" if _has_gpu() else "cpu"
    message = torch.ones(MESSAGE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(message)
        if _has_gpu():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    slowest = torch.tensor(best, device=device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return float(slowest)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    own = describe()
    ranks, seconds = [own], None
    if "RANK" in os.environ:
        if _has_gpu():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if _has_gpu() else "gloo", timeout=timedelta(minutes=5)
        )
        ranks = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)  # the world: every rank compares all
        seconds = all_reduce_seconds()
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
        if rank != 0:
            sys.exit(2 if problems(ranks) else 0)
    hosts = sorted({rank["host"] for rank in ranks})
    print(
        f"ranks       {len(ranks)} on {len(hosts)} machines: {', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''}"
    )
    print(f"GPUs        {', '.join(sorted({rank['gpu'] for rank in ranks}))}")
    print(f"versions    {', '.join(f'{name} {version}' for name, version in own['versions'].items())}")
    if seconds is not None:
        rate = MESSAGE_BYTES / seconds / 1e9
        print(f"all-reduce  {MESSAGE_BYTES >> 20} MiB over all ranks in {1e3 * seconds:.1f} ms ({rate:.1f} GB/s)")
    if found := problems(ranks):
        raise UserError(*found)


if __name__ == "__main__":
    run_cli(main)
