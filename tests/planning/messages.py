"""Bytes that this rank sends in collectives, by the group they go through, while something runs."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Messages(TorchDispatchMode):
    """Counts as rings send: (n - 1) / n of a gathered or scattered tensor, twice that of a reduced one.

    names: axes by a group's `group_name`. sent: bytes by axis; what is sent from one rank to another is "pipeline", and
    through other groups "others".
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0].strip("_"), [*args, *(kwargs or {}).values()])
        return function(*args, **(kwargs or {}))

    def _count(self, operation: str, arguments: list[Any]) -> None:
        [group] = [found for each in arguments if (found := _group(each)) is not None]
        sizes = [[t.nbytes for t in tree_leaves(each) if isinstance(t, Tensor)] for each in arguments]
        tensors = sorted(sum(each) for each in sizes if each)
        share = (group.size() - 1) / group.size()
        largest = tensors[-1] if tensors else 0
        # The larger tensor of a gather is its output, that of a scatter its input.
        factors = {"allreduce": 2 * share, "allgather": share, "reduce_scatter": share, "alltoall": share, "send": 1.0}
        factor = next((value for name, value in factors.items() if operation.startswith(name)), 0.0)
        # Megatron sends between stages through several groups, also the whole world's.
        axis = "pipeline" if operation == "send" else self.names.get(group.group_name, "others")
        self.sent[axis] += int(factor * largest)


def _group(argument: Any) -> ProcessGroup | None:
    if isinstance(argument, ProcessGroup):
        return argument
    try:
        return ProcessGroup.unbox(argument)
    except (TypeError, RuntimeError):
        return None
