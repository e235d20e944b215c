"""Makes this process believe that it has an H100 and Transformer Engine: imported before anything of Megatron's is.

`LONGRED_TE=stub`: Transformer Engine's own Python over plain torch kernels. `LONGRED_TE=compiled`: as it is installed,
with its compiled module; its kernels are not run, since tensors are on the CPU either way: modules are constructed.
"""

import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Transformer Engine compiles small functions
os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # scales of delayed scaling in its Python, and not in a kernel
os.environ.pop("LONGRED_DEVICE", None)  # tests/conftest.py forces the CPU

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

CAPABILITY = (9, 0)
COMPILED = os.environ["LONGRED_TE"] == "compiled"
needs_plain_kernels = pytest.mark.skipif(COMPILED, reason="the compiled kernels do not run on tensors of the CPU")


def _answer_as_a_gpu() -> None:
    """What is asked of the device; tensors stay on the CPU, by the project's shim for Megatron."""
    torch.cuda.is_available = lambda: True
    from longred_megatron.device import on_gpu
    from longred_megatron.parallel import cpu_shim

    assert on_gpu(), "Transformer Engine cannot be imported"
    cpu_shim.on_gpu = lambda: False
    cpu_shim._let_torch_adam_load_its_state = lambda: None  # the optimizer is Transformer Engine's
    cpu_shim.install()
    properties = SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, name="H100")
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "Event": type("Event", (cpu_shim._InertStream,), {"elapsed_time": lambda self, end: 0.0}),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    Tensor.is_cuda = property(lambda self: True)
    from longred_megatron.kernels import linear_loss

    linear_loss._add_product_of_apex = _add_product


def _import_over_plain_kernels() -> dict[str, int]:
    """Imports Transformer Engine over the modules beside this one; returns how often each kernel was called."""
    from tests.gpu_path import attention, compiled, fp8, kernels

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for the compiled library
    module = compiled.Compiled(kernels.KERNELS | attention.KERNELS | fp8.KERNELS)
    sys.modules[compiled.NAME] = module
    # Of its export to ONNX and its inference, which nothing here runs. Away again afterwards: others ask for them too.
    unused = {name: MagicMock(__spec__=ModuleSpec(name, None)) for name in ("onnx", "onnxscript", "einops")}
    unused = {name: mock for name, mock in unused.items() if name not in sys.modules}
    sys.modules.update(unused)
    with warnings.catch_warnings(action="ignore"):  # it does not find its library and goes on without torch
        import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel, utils

    for name in unused:
        del sys.modules[name]
    context_parallel.flash_attn_p2p_communicate = _exchange
    backends.UnfusedDotProductAttention.forward = _unfused
    # fp32 in the place of fp16, which it refuses: a fault shows as an error above 1e-5, and not only above 2**-7.
    for each in (backends, utils):
        each.torch = _Torch("torch")
    return module.calls


class _Torch(ModuleType):
    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _unfused(*arguments: Any, **settings: Any) -> Tensor:
    raise AssertionError("Transformer Engine has taken its unfused attention, which holds [batch, heads, seq, seq]")


def _exchange(
    rank: int, send: Tensor, target: int, receive: Tensor, source: int, group: dist.ProcessGroup, batched: bool
) -> list[Any]:
    """A step of the ring. By gloo's sends and receipts, neighbours would wait for each other."""
    everybody = [torch.empty_like(send) for _ in range(group.size())]
    dist.all_gather(everybody, send.contiguous(), group=group)
    receive.copy_(everybody[dist.get_group_rank(group, source)])
    return []


def _add_product(hidden: Tensor, grad_logits: Tensor, total: Tensor) -> None:
    """apex's wgrad_gemm_accum_fp32."""
    total.addmm_(grad_logits.float().t(), hidden.float())


calls: dict[str, int] = {} if COMPILED else _import_over_plain_kernels()
_answer_as_a_gpu()
