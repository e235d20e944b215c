"""Transformer Engine's casts to FP8 in plain torch: delayed scaling, current scaling, and blocks of 128.

The tensors are Transformer Engine's own, with the bytes and scales that its kernels would write; MXFP8, which a
Hopper has not, raises.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.gpu_path.kernels import plain, torch_dtype

BLOCK = 128


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """The quantizer's tensor with the buffers that it says it has."""
    from transformer_engine.pytorch.tensor import Float8Quantizer

    if isinstance(quantizer, Float8Quantizer):
        return _empty_delayed(quantizer, shape, dtype)
    sizes = quantizer.inner_tensor_specs(tuple(shape))
    described = quantizer.storage_metadata(dtype)
    made, settings = described["cls"], described["nontensor_kwargs"]
    buffers = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in sizes.items()}
    return _make(made, settings | {argument: buffers.get(name) for name, argument in made._INNER_TENSORS}, shape)


def _empty_delayed(quantizer: Any, shape: list[int], dtype: torch.dtype) -> Any:
    """Of delayed scaling's quantizer, which alone does not say what its buffers are."""
    from transformer_engine.pytorch.tensor import Float8Tensor, Float8TensorStorage

    turned = [shape[-1], *shape[:-1]]
    settings = {
        "data": torch.zeros(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": torch.zeros(turned, dtype=torch.uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": torch.ones(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "fake_dtype": dtype,
    }
    return _make(Float8TensorStorage if quantizer.internal else Float8Tensor, settings, shape)


def _make(made: type, settings: dict[str, Any], shape: list[int]) -> Any:
    """An inner storage, or a tensor, which knows its shape and its dtype by other names."""
    if issubclass(made, Tensor):
        settings |= {"shape": tuple(shape), "dtype": settings.pop("fake_dtype"), "requires_grad": False}
    return made(**settings)


def _largest(quantizer: Any) -> float:
    return torch.finfo(torch_dtype(quantizer.dtype)).max


def _bytes(x: Tensor, scale: Tensor, quantizer: Any) -> Tensor:
    largest = _largest(quantizer)
    return (x * scale).clamp(-largest, largest).to(torch_dtype(quantizer.dtype)).view(torch.uint8)


def _scale(amax: Tensor, quantizer: Any) -> Tensor:
    """What brings `amax` to the format's largest number; 1 where all are zero."""
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, _largest(quantizer) / amax, 1.0)
    return torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale


def _blocks(x: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> its bytes, and the inverse scales of 1 x 128 or 128 x 128 blocks as they are laid out."""
    rows, columns = x.shape
    tall = BLOCK if quantizer.block_scaling_dim == 2 else 1
    down, across = math.ceil(rows / tall), math.ceil(columns / BLOCK)
    padded = torch.zeros(down * tall, across * BLOCK)
    padded[:rows, :columns] = x
    scale = _scale(padded.view(down, tall, across, BLOCK).abs().amax((1, 3)), quantizer)
    each = scale.repeat_interleave(tall, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    return _bytes(x, each, quantizer), (1 / scale) if tall > 1 else (1 / scale).T


def _write(target: Tensor | None, values: Tensor) -> None:
    """Into the first corner: scales are padded."""
    if target is not None:
        target[tuple(slice(size) for size in values.shape)].copy_(values)


def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Casts `tensor` into `output` or a new tensor; a set `noop` leaves the output as it is."""
    from transformer_engine.pytorch.tensor import Float8BlockQuantizer, Float8CurrentScalingQuantizer, Float8Quantizer

    x = plain(tensor).detach().float()
    out = output if output is not None else quantizer.make_empty(x.shape, dtype=tensor.dtype)
    if noop is not None and bool(noop):
        return out
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(quantizer, Float8BlockQuantizer):
        if out._rowwise_data is not None:
            data, scales = _blocks(flat, quantizer)
            out._rowwise_data.copy_(data.view(out._rowwise_data.shape))
            _write(out._rowwise_scale_inv, scales)
        if out._columnwise_data is not None:
            data, scales = _blocks(flat.T.contiguous(), quantizer)
            out._columnwise_data.copy_(data.view(out._columnwise_data.shape))
            _write(out._columnwise_scale_inv, scales)
        return out
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        amax = x.abs().amax()
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = _scale(amax, quantizer)
    elif isinstance(quantizer, Float8Quantizer):
        scale = quantizer.scale.reshape(())
        quantizer.amax.copy_(torch.maximum(quantizer.amax, x.abs().amax()))
    else:
        raise NotImplementedError(f"{type(quantizer).__name__} has no plain torch form in tests/gpu_path/fp8.py")
    data = _bytes(flat, scale, quantizer)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.T.reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.fill_(1 / scale)
    return out


def dequantize(tensor: Any, otype: Any) -> Tensor:
    return tensor.dequantize(dtype=torch_dtype(otype))


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    turned = data.reshape(-1, data.shape[-1]).T.contiguous().reshape(data.shape[-1], *data.shape[:-1])
    return turned if out is None else out.copy_(turned)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """(gradient of the bias, gradient in FP8)."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantizer(gradient)


KERNELS = {
    function.__name__: function
    for function in (create_empty_quantized_tensor, quantize, dequantize, fp8_transpose, bgrad_quantize)
}
