"""What a step reports: one reduction over the world, one line of JSON, TensorBoard, one console line."""

import json
import math
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from longred_megatron.files import write_text
from longred_megatron.recipe import Recipe
from longred_megatron.training.order import HIDDEN_STATE_OBJECTIVES

# Dense peak of the tensor cores in FLOP/s (vendor data sheets), by a part of the device's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def loss_names(layers: Mapping[str, Iterable[int]], objectives: Iterable[str]) -> list[str]:
    """The names `stage_losses` may report in any step, the same on every rank."""
    names = []
    for objective in objectives:
        if objective in HIDDEN_STATE_OBJECTIVES:
            names += [f"loss/{objective}/layer_{k}" for k in layers[objective]]
        else:
            names.append(f"loss/{objective}")
    return names


def reduce_losses(
    losses: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    recipe: Recipe,
    groups: ProcessGroupCollection,
) -> dict[str, float]:
    """The step's losses from every rank's shares.

    loss/<objective> = (1 / its micro-batches) * sum over micro-batches, stages, context ranks and (where tokens are
    split over them) tensor ranks; loss = (1/M) * sum over objectives of weight * micro-batches * loss/<objective>.
    One sum over the whole world: a share that every tensor rank holds is divided by their number first.
    """
    # Summed on the device: one copy to the host a step, not one a loss.
    total = torch.zeros(len(names), dtype=torch.float64, device=torch.cuda.current_device())
    for shares in losses:
        for name, share in shares.items():
            copies = 1 if "layer_" in name and recipe.parallel.sequence else groups.tp.size()
            total[names.index(name)] += share.double() / copies
    torch.distributed.all_reduce(total)  # the world: every rank holds shares of some micro-batch, stage or tokens
    values = dict(zip(names, total.tolist(), strict=True))
    step_loss = 0.0
    reduced: dict[str, float] = {}
    for objective, settings in recipe.objectives.items():
        own = {n: v / settings.microbatches for n, v in values.items() if n.split("/")[1] == objective}
        mean = math.fsum(own.values())
        reduced |= {f"loss/{objective}": mean}
        if objective == "short_restoration":
            reduced |= own
        step_loss += settings.weight * settings.microbatches * mean
    return {"loss": step_loss / recipe.num_microbatches} | reduced


def first_non_finite(metrics: Mapping[str, Any]) -> str | None:
    """The name of the first loss or the gradient norm that is NaN or infinite."""
    names = [n for n in metrics if n.startswith("loss/")] + ["loss", "grad_norm"]
    return next((n for n in names if not math.isfinite(metrics[n])), None)


def memory() -> dict[str, float]:
    """Peak memory of this rank so far, bytes."""
    if torch.cuda.is_initialized():
        return {"memory/peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    return {"memory/peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def peak_flops() -> float | None:
    """Peak FLOP/s of this rank's GPU; None without one or for one not in the table."""
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


@dataclass
class MetricsWriter:
    """metrics.jsonl, tensorboard/ and the console of a run; only rank 0 makes one."""

    folder: Path
    num_steps: int
    first_step: int
    console: TextIO
    num_phases: int = 1
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        path = self.folder / "metrics.jsonl"
        kept = []
        if path.exists():  # lines after the checkpoint we resume from would be written a second time
            lines = path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < self.first_step]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=self.first_step)

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
            if name.startswith("loss") and "layer_" not in name
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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
