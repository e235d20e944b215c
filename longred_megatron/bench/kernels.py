"""Each loss kernel, forward and backward, against eager torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from longred_megatron.bench.base import TOLERANCES, Case, Comparison, Facts, Side, Sizes
from longred_megatron.device import on_gpu
from longred_megatron.dtypes import DTYPES
from longred_megatron.kernels.attention_divergence import attention_divergence
from longred_megatron.kernels.cosine_distance import cosine_distance
from longred_megatron.kernels.cross_entropy import linear_cross_entropy
from longred_megatron.kernels.divergence import linear_distillation
from longred_megatron.kernels.relation_divergence import relation_divergence

SHORT = 100  # times a repeat computes a loss without products, which takes some milliseconds
BLOCK_KEYS = 512  # of attention's keys, which come in blocks
NOISE = 0.3  # of the teacher's values: how far the student's are from them


class Kernels(Comparison):
    """Loss kernels, forward and backward, against eager torch on the same tensors."""

    name = "kernels"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        params = "bf16" if on_gpu() else "fp32"
        for kernel in KERNELS:
            for tokens in (sizes.sequence_length // 2, sizes.sequence_length, 2 * sizes.sequence_length):
                shape = Shape(tokens, sizes.hidden_size, sizes.vocabulary, sizes.heads)
                times = 1 if kernel.flops(shape) else SHORT
                yield Case(
                    f"{kernel.name}, {tokens} tokens, {params}",
                    partial(LossOfTensors, kernel, "ours", shape, params, times),
                    partial(LossOfTensors, kernel, "eager", shape, params, times),
                    tokens * times,
                    "tokens",
                    kernel.flops(shape),
                    params,
                    TOLERANCES[params],
                )


@dataclass(frozen=True)
class Shape:
    """Of a kernel's inputs."""

    tokens: int
    hidden: int
    vocabulary: int
    heads: int

    @property
    def of_heads(self) -> tuple[int, int, int]:
        """[tokens, heads, head_dim]."""
        return self.tokens, self.heads, self.hidden // self.heads


@dataclass(frozen=True)
class Kernel(ABC):
    """A loss of tensors, computed by a kernel of this project and in eager torch."""

    name: str

    @abstractmethod
    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Random tensors; those that want a gradient say so."""

    @abstractmethod
    def ours(self, *inputs: Tensor) -> Tensor:
        """The loss."""

    @abstractmethod
    def eager(self, *inputs: Tensor) -> Tensor:
        """The same."""

    @abstractmethod
    def flops(self, shape: Shape) -> float | None:
        """Of forward and backward, of causal scores the half that is seen; None: it is not made of products."""


class CrossEntropy(Kernel):
    """Of hidden states and a head."""

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        hidden, _ = _pair((shape.tokens, shape.hidden), dtype, device)
        weight, _ = _pair((shape.vocabulary, shape.hidden), dtype, device, scale=shape.hidden**-0.5)
        return [hidden, weight, torch.randint(shape.vocabulary, (shape.tokens,), device=device)]

    def ours(self, *inputs: Tensor) -> Tensor:
        hidden, weight, labels = inputs
        return linear_cross_entropy(hidden, weight, labels, vocab_size=len(weight))

    def eager(self, *inputs: Tensor) -> Tensor:
        hidden, weight, labels = inputs
        return cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")

    def flops(self, shape: Shape) -> float:
        return 6 * shape.tokens * shape.hidden * shape.vocabulary


class Divergence(Kernel):
    """KL(teacher || student) of hidden states and heads of both."""

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        states = _pair((shape.tokens, shape.hidden), dtype, device)
        weights = _pair((shape.vocabulary, shape.hidden), dtype, device, scale=shape.hidden**-0.5)
        return [each for pair in zip(states, weights, strict=True) for each in pair]

    def ours(self, *inputs: Tensor) -> Tensor:
        hidden, weight, teacher, head = inputs
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # every token counts
        return linear_distillation(hidden, weight, teacher, head, labels, vocab_size=len(weight))

    def eager(self, *inputs: Tensor) -> Tensor:
        hidden, weight, teacher, head = inputs
        ours, theirs = (log_softmax((h @ w.t()).float(), -1) for h, w in ((hidden, weight), (teacher, head)))
        return kl_div(ours, theirs, reduction="sum", log_target=True)

    def flops(self, shape: Shape) -> float:
        return 8 * shape.tokens * shape.hidden * shape.vocabulary


class CosineDistance(Kernel):
    """Of hidden states."""

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return list(_pair((shape.tokens, shape.hidden), dtype, device))

    def ours(self, *inputs: Tensor) -> Tensor:
        return cosine_distance(*inputs)

    def eager(self, *inputs: Tensor) -> Tensor:
        student, teacher = inputs
        return (1 - cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()

    def flops(self, shape: Shape) -> None:
        return None


class RelationDivergence(Kernel):
    """Of the relations of queries among each other."""

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        return list(_pair((1, *shape.of_heads), dtype, device))

    def ours(self, *inputs: Tensor) -> Tensor:
        return relation_divergence(*inputs)

    def eager(self, *inputs: Tensor) -> Tensor:
        ours, theirs = (_causal_log_softmax(x, x) for x in (each.transpose(1, 2) for each in inputs))
        return (theirs.exp() * (theirs - ours)).sum()

    def flops(self, shape: Shape) -> float:
        return 4 * shape.hidden * shape.tokens**2


class AttentionDivergence(Kernel):
    """Of two attentions; without a gradient."""

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        (query, other_query), (key, other_key) = (_pair((1, *shape.of_heads), dtype, device) for _ in range(2))
        return [x[0].detach().transpose(0, 1).contiguous() for x in (query, key, other_query, other_key)]

    def ours(self, *inputs: Tensor) -> Tensor:
        query, key, other_query, other_key = inputs
        keys, other_keys = key.split(BLOCK_KEYS, 1), other_key.split(BLOCK_KEYS, 1)
        return attention_divergence(query, keys, other_query, other_keys).sum()

    def eager(self, *inputs: Tensor) -> Tensor:
        ours, theirs = _causal_log_softmax(*inputs[:2]), _causal_log_softmax(*inputs[2:])
        return (ours.exp() * (ours - theirs)).sum()

    def flops(self, shape: Shape) -> float:
        return 2 * shape.hidden * shape.tokens**2


KERNELS: tuple[Kernel, ...] = (
    CrossEntropy("cross_entropy"),
    Divergence("divergence"),
    CosineDistance("cosine_distance"),
    RelationDivergence("relation_divergence"),
    AttentionDivergence("attention_divergence"),
)


class LossOfTensors(Side):
    """A kernel's loss and, where an input wants them, its gradients, so many times. which: "ours" or "eager"."""

    def __init__(self, kernel: Kernel, which: str, shape: Shape, params: str, times: int) -> None:
        torch.manual_seed(0)
        self._inputs = kernel.inputs(shape, DTYPES[params], torch.device("cuda" if on_gpu() else "cpu"))
        self._function = kernel.ours if which == "ours" else kernel.eager
        self._times = times
        self._loss = torch.zeros(())

    def once(self) -> None:
        for _ in range(self._times):
            for each in self._inputs:
                each.grad = None
            loss = self._function(*self._inputs)
            if loss.requires_grad:
                loss.backward()
        self._loss = loss.detach()

    def facts(self) -> Facts:
        norms = {f"gradient {i}": float(x.grad.norm()) for i, x in enumerate(self._inputs) if x.grad is not None}
        return {"loss": float(self._loss)} | norms


def _pair(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A student's values, which want a gradient, and the teacher's near them. scale: their size."""
    teacher = scale * torch.randn(shape, device=device)
    student = teacher + scale * NOISE * torch.randn(shape, device=device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def _causal_log_softmax(rows: Tensor, columns: Tensor) -> Tensor:
    """[..., tokens, tokens] in fp32 of [..., tokens, head_dim]."""
    scores = (rows @ columns.transpose(-1, -2)).float() / math.sqrt(rows.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -1e30).log_softmax(-1)
