"""The one decision where this process computes: on its GPU, or on the CPU."""

import functools
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from longred_megatron.errors import UserError, plain

VARIABLE = "LONGRED_DEVICE"
# Megatron takes these where it can import them, whether or not there is a GPU for their kernels.
GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")


def force_cpu() -> None:
    """For this process, if Megatron has not been imported, and for those that it starts."""
    os.environ[VARIABLE] = "cpu"


def cpu_is_forced() -> bool:
    """Whether the user, or a command that computes little, wants the CPU: `LONGRED_DEVICE=cpu`.

    Raises:
        UserError: the variable has another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "cpu"):
        raise UserError(f"{VARIABLE}={value!r}: set it to cpu to compute on the CPU, or to nothing to use a GPU if any")
    return value == "cpu"


@functools.cache
def on_gpu() -> bool:
    """Whether Megatron's modules compute on a GPU: one is visible, Transformer Engine can be imported, and the CPU is
    not forced. Asked for the first time before Megatron is imported, see `BeforeMegatron`.

    On the CPU, what only a GPU can use cannot be imported from then on.
    """
    if _can_use_gpu():
        return True
    for name in GPU_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's mark for what cannot be imported
    return False


def _can_use_gpu() -> bool:
    if cpu_is_forced():
        return False
    import torch  # takes long, and --help needs none of this

    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # an ImportError where it is not installed; anything where it does not fit the machine
        if os.environ.get("RANK", "0") == "0":
            print(
                f"warning: there is a GPU, but Transformer Engine cannot be imported ({plain(str(error))[:200]}); "
                "computing on the CPU: install it (pip install -e '.[gpu]', or docker/) to use the GPU",
                file=sys.stderr,
            )
        return False
    return True


def bf16_is_slow() -> bool:
    """Whether this process computes on a CPU without instructions for bf16 products, as those without AVX-512."""
    import torch

    return not on_gpu() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class BeforeMegatron:
    """Finds no module, but decides when the first of Megatron's is looked for: on the way of every import of them."""

    def find_spec(self, name: str, *details: Any) -> ModuleSpec | None:
        if name == "megatron":
            on_gpu()
        return None
