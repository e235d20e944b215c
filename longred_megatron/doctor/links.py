"""How fast the ranks of each group of the recipe's layout talk to each other."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Finding, not_tried
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.team import Report
from longred_megatron.errors import listed
from longred_megatron.parallel.groups import initialize
from longred_megatron.recipe import load_recipe

MESSAGE_BYTES = {True: 2**28, False: 2**22}  # on a GPU, and on a CPU
REPEATS = 5
GROUPS = {"tp": "tensor", "pp": "pipeline", "cp": "context", "dp": "data"}
# Groups of one kind that have the same work should be level; half is past what other traffic explains.
SLOW = 0.5
SECONDS = 120.0


def check(patient: Patient) -> Iterator[Finding]:
    """Every group's bandwidth; on GPUs, groups that are far slower than others of their kind."""
    if patient.team.size == 1:
        yield not_tried("links", "there is one rank")
        return
    ranks = patient.team.run(measure, patient.small[patient.main_format], seconds=SECONDS)
    for name, kind in GROUPS.items():
        rates = {tuple(rank[name]["ranks"]): rank[name]["bytes_per_second"] for rank in ranks if name in rank}
        if rates:
            yield judge(kind, rates, patient.team.hosts)


def measure(report: Report, small: Path) -> dict[str, dict[str, Any]]:
    """{group: its ranks and bytes a second}, of this rank's groups of more than one."""
    recipe = load_recipe(small)
    groups, found = initialize(recipe.parallel, recipe.training.seed), {}
    for name in GROUPS:
        group = getattr(groups, name)
        torch.distributed.barrier()  # the world: groups of one kind are measured at the same time, as they are used
        if group.size() > 1:
            report(f"measuring the {GROUPS[name]} group")
            send = _to_the_next if name == "pp" else _sum
            seconds = _best_seconds(send, group)
            members = torch.distributed.get_process_group_ranks(group)
            found[name] = {"ranks": members, "bytes_per_second": MESSAGE_BYTES[on_gpu()] / seconds}
    return found


def _best_seconds(send: Callable[[torch.Tensor, Any], None], group: Any) -> float:
    device = torch.cuda.current_device()
    message, best = torch.ones(MESSAGE_BYTES[on_gpu()] // 4, device=device), float("inf")
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        torch.distributed.barrier(group)  # its ranks begin together
        started = time.perf_counter()
        send(message, group)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    slowest = torch.tensor(best, device=device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, group=group)  # one figure a group
    return float(slowest)


def _sum(message: torch.Tensor, group: Any) -> None:
    torch.distributed.all_reduce(message, group=group)


def _to_the_next(message: torch.Tensor, group: Any) -> None:
    """Each stage sends to the next, the last one to the first."""
    size, rank = group.size(), group.rank()
    members = torch.distributed.get_process_group_ranks(group)
    received = torch.empty_like(message)
    both = [
        torch.distributed.P2POp(torch.distributed.isend, message, members[(rank + 1) % size], group),
        torch.distributed.P2POp(torch.distributed.irecv, received, members[(rank - 1) % size], group),
    ]
    for work in torch.distributed.batch_isend_irecv(both):
        work.wait()


def judge(kind: str, rates: dict[tuple[int, ...], float], hosts: Sequence[str]) -> Finding:
    """One kind of group. rates: bytes a second, by the ranks of each group."""
    name, usual = f"{kind} links", statistics.median(rates.values())
    what = "a message to the next stage" if kind == "pipeline" else "a sum"
    size = MESSAGE_BYTES[on_gpu()] >> 20
    text = (
        f"{what} of {size} MiB: {usual / 1e9:.2f} GB/s in the middle of {len(rates)} groups of {len(next(iter(rates)))}"
    )
    numbers = {" ".join(map(str, ranks)): rate for ranks, rate in rates.items()}
    slow = {ranks: rate for ranks, rate in rates.items() if rate < SLOW * usual}
    if slow and on_gpu():  # groups of CPU ranks share cores, which makes them differ
        listing = "; ".join(
            f"ranks {listed(ranks)} on {listed(sorted({hosts[rank] for rank in ranks}))}: {rate / 1e9:.2f} GB/s"
            for ranks, rate in sorted(slow.items(), key=lambda item: item[1])[:8]
        )
        change = "look at NVLink (nvidia-smi topo -m), the network card and NCCL_IB_HCA of these machines"
        return Finding(name, "wrong", f"{text}; {listing}", change, numbers)
    note = "" if on_gpu() else "; over gloo, by processes that share the cores"
    return Finding(name, "ok", text + note, numbers=numbers)
