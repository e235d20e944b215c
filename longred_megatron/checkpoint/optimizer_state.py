"""The distributed optimizer's state in a checkpoint: each rank writes and reads just the numbers it holds.

Megatron divides the state over the data- and context-parallel ranks as flat ranges of each parameter. A flat range of a
tensor is a few boxes of it, and boxes are what a torch_dist checkpoint is made of: the state is saved without a message
or a copy of it, and any layout reads its own boxes out of whole parameters. (Megatron's own reshardable format first
gathers all of it on every data-parallel rank, 12 bytes a parameter, of which one writes.)
"""

import math
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """For Megatron to save or to load into: `optimizer` (hyperparameters and step), and `tensors`, views of the state.

    model_state: the sharded state of the model chunks that the optimizer trains, with the parameters as data.
    """
    inner = _distributed(optimizer)
    hyperparameters = inner.state_dict()
    if not inner.optimizer.state:  # no step has made it: allocated, to be loaded into
        inner.load_state_dict(hyperparameters)
    whole, _ = extract_sharded_tensors_and_factories(model_state)
    entries = {id(entry.data): entry for entry in nested_values(whole)}
    tensors: list[ShardedTensor] = []
    for parameter in inner.model_param_gbuf_map:
        first = inner._get_model_param_range_map(parameter)["param"].start
        state = inner._get_main_param_and_optimizer_states(parameter)
        for name in ("param", *inner.optimizer_state_keys):
            tensors += _boxed(entries[id(parameter)], name, state[name].detach().view(-1), first)
    return {**hyperparameters, "tensors": tensors}


def held_state(optimizer: MegatronOptimizer) -> dict[str, Tensor]:
    """What this rank holds of each parameter, flat, as `param 0`, `exp_avg 0`, ...: its range of the fp32 weights and
    of Adam's moments. Views; after the first step, or after a checkpoint was loaded."""
    inner = _distributed(optimizer)
    states = [inner._get_main_param_and_optimizer_states(parameter) for parameter in inner.model_param_gbuf_map]
    names = ("param", *inner.optimizer_state_keys)
    return {f"{name} {i}": state[name].detach().view(-1) for name in names for i, state in enumerate(states)}


def load(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Takes over the number of steps; the tensors have been loaded in place.

    Rates and decay come from the recipe at every step. What else is in a group belongs to the Adam that wrote it:
    torch's, on a CPU, and Transformer Engine's have other keys, and neither can step with the other's.
    """
    inner = _distributed(optimizer)
    # Transformer Engine's has no number before its first step.
    [step] = {int(group.get("step", 0)) for group in loaded["optimizer"]["param_groups"]}
    own = inner.state_dict()
    for group in own["optimizer"]["param_groups"]:
        group["step"] = step
    inner.load_state_dict(own)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements start ... stop - 1 of a row-major tensor, in order, as at most 2 x dims - 1 boxes (offset, size)."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    while start < stop:
        dim = next(d for d, stride in enumerate(strides) if start % stride == 0 and stride <= stop - start)
        offset = tuple(start // stride % length for stride, length in zip(strides, shape, strict=True))
        length = min((stop - start) // strides[dim], shape[dim] - offset[dim])
        yield offset, (*(1 for _ in shape[:dim]), length, *shape[dim + 1 :])
        start += length * strides[dim]


def _boxed(entry: ShardedTensor | ShardedTensorFactory, name: str, held: Tensor, first: int) -> Iterator[ShardedTensor]:
    """The state `name` of a parameter, of which `held` has the elements from `first` on."""
    # Gate and up projection, one parameter, are two parts of the tensor in the checkpoint: two views of the parameter.
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for part in parts:
        begin = part.data.storage_offset() - entry.data.storage_offset()
        start, stop = max(begin, first), min(begin + part.data.numel(), first + held.numel())
        prepended = part.prepend_axis_num
        at = start - first
        for offset, size in boxes(tuple(part.local_shape), start - begin, stop - begin):
            shape = (*(1 for _ in range(prepended)), *size)
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{part.key}",
                data=held[at : at + math.prod(size)].view(shape),
                dtype=held.dtype,
                local_shape=shape,
                global_shape=part.global_shape,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, (0,) * prepended + offset, strict=True)),
                axis_fragmentations=None,  # boxes of any size
                replica_id=(*part.replica_id[:2], 0),  # the data-parallel ranks hold different boxes
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
            at += math.prod(size)


def _distributed(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return inner
