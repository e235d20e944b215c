"""What references share: micro-batches from their file, and AdamW."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longred_megatron.recipe import Optimizer


@dataclass(frozen=True)
class PlainBatch:
    """See `training.microbatches.dump`; each tensor is [sequences, sequence_length]."""

    objective: str
    tokens: Tensor
    labels: Tensor
    student_positions: Tensor
    teacher_positions: Tensor | None = None


def read_microbatches(path: Path, device: torch.device) -> Iterator[PlainBatch]:
    """The micro-batches of a dumped step, in order."""
    with safe_open(path, "pt", device=str(device)) as file:
        for i, objective in enumerate(json.loads(file.metadata()["objectives"])):
            own = {name.partition(".")[2]: name for name in file.keys() if name.startswith(f"{i}.")}  # noqa: SIM118
            tensors = {field: file.get_tensor(name) for field, name in own.items()}
            yield PlainBatch(objective, **tensors)


class PlainAdamW:
    """torch's AdamW with clipping; of 16-bit weights it updates fp32 copies, as optimizers for training in bf16 do.

    Norms and biases do not decay.
    """

    def __init__(self, model: nn.Module, settings: Optimizer) -> None:
        self._weights = list(model.parameters())
        self._copies = [w if w.dtype == torch.float32 else w.detach().float() for w in self._weights]
        self._clip_grad = settings.clip_grad
        groups = [
            {"params": [w for w in self._copies if w.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [w for w in self._copies if w.dim() == 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    def step(self) -> float:
        """Updates the weights with their gradients, which are gone afterwards; returns the norm before clipping."""
        for weight, copy in zip(self._weights, self._copies, strict=True):
            if copy is not weight and weight.grad is not None:
                copy.grad, weight.grad = weight.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self._copies, self._clip_grad)
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            for weight, copy in zip(self._weights, self._copies, strict=True):
                if copy is not weight:
                    weight.copy_(copy)
        return float(norm)
