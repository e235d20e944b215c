"""What a step reports: one reduction over the world, one line of JSON, TensorBoard, one console line."""

import json
import math
import re
import resource
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.tensorboard import SummaryWriter

from longred_megatron.files import write_text
from longred_megatron.objectives.base import Objective, Term
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.run_folder import METRICS, TENSORBOARD

Key = tuple[str, str | None]  # an objective, and the name of a term of it or None

# Dense peaks of the tensor cores in bf16 and in FP8, in FLOP/s (vendor data sheets), by a part of the device's name.
PEAK_FLOPS: dict[str, tuple[float, float | None]] = {
    "H100 PCIe": (756e12, 1513e12),
    "H100 NVL": (835e12, 1671e12),
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "A100": (312e12, None),
    "GB200": (2500e12, 5000e12),
    "B200": (2250e12, 4500e12),
}


class LossReducer:
    """Sums the terms of a step over all ranks. One for a phase: what terms there are is asked for once."""

    def __init__(self, objectives: Mapping[str, Objective], groups: ProcessGroupCollection) -> None:
        self._objectives, self._groups = objectives, groups
        self._keys: list[Key] | None = None

    def __call__(self, microbatches: Sequence[MicroBatch], terms: Sequence[Sequence[Term]]) -> dict[str, float]:
        """The step's losses from every rank's terms, by micro-batch.

        loss/<objective> = (1 / its micro-batches) * sum over its terms, micro-batches, stages, context ranks and (where
        a term is split over them) tensor ranks; loss/<objective>/<name> the same of the terms of a name; loss =
        (1/M) * sum over objectives of weight * micro-batches * loss/<objective>.
        One sum over the whole world: a share that every tensor rank holds is divided by their number first.
        """
        shares = [((m.objective, term.name), term) for m, own in zip(microbatches, terms, strict=True) for term in own]
        if self._keys is None:
            self._keys = self._all_keys([key for key, _ in shares])
        # Summed on the device: one copy to the host a step, not one a term.
        total = torch.zeros(len(self._keys), dtype=torch.float64, device=torch.cuda.current_device())
        for key, term in shares:
            copies = self._groups.tp.size() if term.copies == "each tensor rank" else 1
            total[self._keys.index(key)] += term.share.double() / copies
        torch.distributed.all_reduce(total)  # the world: every rank holds shares of some micro-batch, stage or tokens
        values = dict(zip(self._keys, total.tolist(), strict=True))
        step_loss = 0.0
        reduced: dict[str, float] = {}
        for objective, settings in self._objectives.items():
            own = {name: v / settings.microbatches for (of, name), v in values.items() if of == objective}
            mean = math.fsum(own.values())
            reduced |= {f"loss/{objective}": mean}
            reduced |= {f"loss/{objective}/{name}": value for name, value in own.items() if name is not None}
            step_loss += settings.weight * settings.microbatches * mean
        return {"loss": step_loss / sum(each.microbatches for each in self._objectives.values())} | reduced

    def _all_keys(self, own: Iterable[Key]) -> list[Key]:
        """The terms of all ranks in one order; a rank knows only those of its stage and of its replica's objectives."""
        parts: list[list[Key]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, list(dict.fromkeys(own)))  # the world, as the sum of a step
        keys = {key for part in parts for key in part}
        silent = self._objectives.keys() - {objective for objective, _ in keys}
        assert not silent, f"no rank owes a term of {', '.join(silent)}: the loss of its kind returns none"
        return sorted(keys, key=_by_number)


def _by_number(key: Key) -> list[tuple[bool, int, str]]:
    """layer_9 before layer_10."""
    parts = re.split(r"(\d+)", f"{key[0]}/{key[1] or ''}")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def first_non_finite(metrics: Mapping[str, Any]) -> str | None:
    """The name of the first loss or the gradient norm that is NaN or infinite."""
    names = [n for n in metrics if n.split("/")[0] == "loss"] + ["grad_norm"]
    return next((n for n in names if not math.isfinite(metrics[n])), None)


def memory() -> dict[str, float]:
    """Peak memory of this rank so far, bytes."""
    if torch.cuda.is_initialized():
        return {"memory/peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    return {"memory/peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def peak_flops(fp8: bool) -> float | None:
    """Peak FLOP/s of this rank's GPU in bf16, or in FP8; None without a GPU, or for one that is not in the table.

    With FP8 the layers' matrix products run in it; attention and the head, which do not, count as if they did.
    """
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name()
    return next((peaks[fp8] for part, peaks in PEAK_FLOPS.items() if part in name), None)


@dataclass
class MetricsWriter:
    """metrics.jsonl, tensorboard/ and the console of a run; only rank 0 makes one.

    console_losses: the metrics that a console line shows first.
    """

    folder: Path
    num_steps: int
    first_step: int
    console: TextIO
    console_losses: Collection[str]
    num_phases: int = 1
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        path = self.folder / METRICS
        kept: list[str] = []
        if path.exists():  # lines after the checkpoint we resume from would be written a second time
            kept, num_damaged = _lines_before(path.read_bytes(), self.first_step)
            if num_damaged:
                aside = path.with_name(f"damaged-{METRICS}")
                shutil.copyfile(path, aside)
                print(
                    f"warning: {path}: {num_damaged} lines are damaged and left out; {aside} has them",
                    file=self.console,
                )
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(self.folder / TENSORBOARD, purge_step=self.first_step)

    def write(self, metrics: Mapping[str, Any]) -> None:
        step = metrics["step"]
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, step)
        done = step - self.first_step + 1
        left = (time.perf_counter() - self._started) / done * (self.num_steps - step)
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4f}"
            for name, value in metrics.items()
            if name in self.console_losses
        )
        phase = f" (phase {metrics['phase']}/{self.num_phases})" if "phase" in metrics else ""
        print(
            f"step {step}/{self.num_steps}{phase}  {losses}  grad {metrics['grad_norm']:.3f}  lr {metrics['lr']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {_clock(left)} left",
            file=self.console,
            flush=True,
        )

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _lines_before(content: bytes, step: int) -> tuple[list[str], int]:
    """The lines of metrics before a step, and how many cannot be read. A last one without an end was being written."""
    *lines, _ = content.split(b"\n")
    kept, num_damaged = [], 0
    for line in lines:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line.decode())
        except (ValueError, TypeError, KeyError, RecursionError):
            num_damaged += 1
    return kept, num_damaged


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
