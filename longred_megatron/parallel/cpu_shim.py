"""Lets Megatron-Core, which names CUDA devices in its code, run on a machine without a GPU.

The only place in the project that replaces functions of other packages. `install()` does nothing where a GPU is used.
What it changes: no GPU is seen any more, CUDA device and stream calls become inert, `device="cuda"` and `.cuda()` mean
the CPU, CUDA random states mean torch's CPU random state, CPU tensors answer to the CUDA type names that Megatron's
distributed optimizer compares with, and that optimizer can restore the state of torch's AdamW.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from longred_megatron.device import on_gpu

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint")


class _InertStream:
    """Stands for a CUDA stream or event where everything runs in program order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_InertStream":
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _cuda_type_name(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(tensor_type)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return wrapped


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


@functools.cache
def install() -> None:
    """Installs the shim once, and only where this process computes on the CPU."""
    if on_gpu():
        return
    cpu = torch.device("cpu")
    replacements: dict[str, Any] = {
        "is_available": lambda: False,
        "device_count": lambda: 0,
        "current_device": lambda: cpu,
        "synchronize": lambda *args, **kwargs: None,
        "set_device": lambda device: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "current_stream": lambda device=None: _InertStream(),
        "default_stream": lambda device=None: _InertStream(),
        "Stream": _InertStream,
        "Event": _InertStream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    # `with torch.device(...)`, which transformers loads models under, knows the factories by identity from a list made
    # at its first use: made before they are replaced, or it would miss every one of them.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    _let_torch_adam_load_its_state()


def _let_torch_adam_load_its_state() -> None:
    """Without apex and Transformer Engine, Megatron uses torch's AdamW, which keeps a tensor `step` per parameter.

    Megatron 0.19.2 asks for that step before the first update has made it, and restores it as one tensor that all
    parameters share, so that every update counts once for each of them. Both are corrected here.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict

    def state_dict_of_any_age(self: Any) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {"step": torch.zeros(())} | moments
        return state_dict(self)

    def load_with_own_steps(self: Any, loaded: dict[str, Any]) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_of_any_age
    DistributedOptimizer.load_state_dict = load_with_own_steps
