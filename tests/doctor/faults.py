"""Faults of the engine that the doctor is there to find, made on purpose."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, layers
from torch import Tensor

from longred_megatron.checkpoint import distributed
from longred_megatron.model import attention, chunk


@contextmanager
def future_seen() -> Iterator[None]:
    """Attention without its causal mask."""

    def faulty(self: attention.SdpaAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    with patch.object(attention.SdpaAttention, "_attend", faulty):
        yield


@contextmanager
def last_key_seen_by_the_one_before() -> Iterator[None]:
    """A causal mask that is off by one, in long sequences alone."""
    attend = attention.SdpaAttention._attend

    def faulty(self: attention.SdpaAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attend(self, query, key, value)
        if key.shape[1] < 64:
            return out
        early = attend(self, query[:, -1:], key, value)  # what the last query sees, without a mask
        return torch.cat([out[:, :-2], early, out[:, -1:]], dim=1)

    with patch.object(attention.SdpaAttention, "_attend", faulty):
        yield


def _with_documents(change: Callable[[Sequence[int]], Sequence[int]]) -> AbstractContextManager[Any]:
    lay = chunk.sequence_layout

    def faulty(num_sequences: int, length: int, documents: Any, *rest: Any, **named: Any) -> Any:
        changed = documents and [change(row) for row in documents]
        return lay(num_sequences, length, changed, *rest, **named)

    return patch.object(chunk, "sequence_layout", faulty)


@contextmanager
def borders_ignored() -> Iterator[None]:
    """All documents of a pack are one."""
    with _with_documents(lambda row: [sum(row)]):
        yield


@contextmanager
def border_late_by_one() -> Iterator[None]:
    """Each document ends a token too late."""
    with _with_documents(lambda row: [row[0] + 1, *row[1:-1], row[-1] - 1] if len(row) > 1 and row[-1] > 1 else row):
        yield


@contextmanager
def border_early_by_one() -> Iterator[None]:
    """Each document ends a token too early."""
    with _with_documents(lambda row: [row[0] - 1, *row[1:-1], row[-1] + 1] if len(row) > 1 and row[0] > 1 else row):
        yield


@contextmanager
def pieces_in_rank_order() -> Iterator[None]:
    """Keys of the context ranks are put together rank after rank, as if their pieces were no zig-zag."""

    def faulty(x: Tensor, num_sequences: int, group: Any) -> Tensor:
        gathered = gather_from_sequence_parallel_region(x, group=group)
        parts = gathered.reshape(group.size(), num_sequences, -1, *x.shape[2:])
        return parts.transpose(0, 1).flatten(1, 2)

    with patch.object(attention, "gather_sequences", faulty):
        yield


@contextmanager
def tensor_reduction_lost() -> Iterator[None]:
    """A layer's output is the own tensor rank's part alone."""
    with patch.object(layers, "reduce_from_tensor_model_parallel_region", lambda x, **named: x):
        yield


@contextmanager
def moments_lost() -> Iterator[None]:
    """A checkpoint is loaded without Adam's moments."""
    load = distributed.load

    def faulty(path: Any, chunks: Any, optimizer: Any = None) -> None:
        load(path, chunks, optimizer)
        for name, tensor in distributed.optimizer_state.held_state(optimizer).items():
            if name.startswith("exp_avg"):
                tensor.zero_()

    with patch.object(distributed, "load", faulty):
        yield


@contextmanager
def steps_lost() -> Iterator[None]:
    """A checkpoint is loaded without the number of steps that Adam has made."""
    load = distributed.load

    def faulty(path: Any, chunks: Any, optimizer: Any = None) -> None:
        load(path, chunks, optimizer)
        for group in optimizer.param_groups:
            group["step"] = 0
        for state in distributed.optimizer_state._distributed(optimizer).optimizer.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"])

    with patch.object(distributed, "load", faulty):
        yield
