"""Transformer Engine's compiled functions in plain torch, but for attention: what its Python calls on the path here."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CUBLAS_VERSION, CUDNN_VERSION = 130100, 92000  # as on an H100 with the versions of constraints.txt


def plain(x: Any) -> Tensor:
    """Any of Transformer Engine's tensors as an ordinary one."""
    return x.dequantize() if hasattr(x, "dequantize") and type(x) is not Tensor and hasattr(x, "_quantizer") else x


def torch_dtype(dtype: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    return TE_DType_To_Torch[DType.cast(dtype)]


def cast(x: Tensor, quantizer: Any) -> Any:
    """`x` as the quantizer wants it; itself where there is none."""
    return x if quantizer is None else quantizer(x)


def generic_gemm(
    A: Any,  # noqa: N803
    transA: bool,  # noqa: N803
    B: Any,  # noqa: N803
    transB: bool,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: None = None,
    comm_type: None = None,
    extra_output: None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, None]:
    """(B or its transpose) x (A or its transpose), as rows; (output, gradient of the bias, None, None)."""
    assert not gelu and comm_overlap is None and not bulk_overlap
    a, b = plain(A), plain(B)
    dtype = torch_dtype(output_dtype) if output_dtype is not None else a.dtype
    a2, b2 = a.reshape(-1, a.shape[-1]).float(), b.reshape(-1, b.shape[-1]).float()
    out = alpha * ((b2.T if transB else b2) @ (a2.T if transA else a2))
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b2.sum(0).to(dtype)
    elif bias is not None:
        out = out + bias.float()
    if not transB:
        out = out.reshape(*b.shape[:-1], out.shape[-1])
    if D is None:
        return cast(out.to(dtype), quantizer), bias_gradient, None, None
    if accumulate:
        D.add_(out.reshape(D.shape).to(D.dtype))
    else:
        D.copy_(out.reshape(D.shape))
    return D, bias_gradient, None, None


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    """(norm, None, 1 / root mean square [rows])."""
    x = input.float()
    inverse = torch.rsqrt(x.square().mean(-1) + eps)
    out = (x * inverse[..., None] * _gamma(weight, zero_centered_gamma)).to(torch_dtype(otype))
    if ln_out is not None:
        assert quantizer is None
        out = ln_out.copy_(out)
    return cast(out, quantizer), None, inverse.reshape(-1)


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight."""
    rows, gradient = x.float().reshape(-1, x.shape[-1]), dz.float().reshape(-1, x.shape[-1])
    inverse = rsigma.float().reshape(-1, 1)
    normed = rows * inverse
    scaled = gradient * _gamma(gamma, zero_centered_gamma)
    dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype).reshape(x.shape), (gradient * normed).sum(0).to(gamma.dtype)


def _rotate(x: Tensor, sign: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return sign * torch.cat((-second, first), dim=-1)


def _rope(x: Tensor, freqs: Tensor, sign: int, qkv_format: Any, *more: Any) -> Tensor:
    """x [tokens, batch, heads, head_dim] with its own row of freqs [tokens, 1, 1, head_dim] for each token."""
    start_positions, interleaved, cu_seqlens, cp_size, _ = more
    assert qkv_format.name == "NVTE_SBHD" and start_positions is None and cu_seqlens is None and not interleaved
    # The kernel cuts the table by itself where it is told of context ranks: row i of a rank is not row i then.
    assert cp_size == 1 and freqs.shape[0] >= x.shape[0]
    angles = freqs[: x.shape[0]].float()
    turned = x.float() * angles.cos() + _rotate(x.float(), sign) * angles.sin()
    return turned.to(x.dtype)


def fused_rope_forward(
    input: Tensor, freqs: Tensor, start_positions: Any, qkv_format: Any, interleaved: bool, *cut: Any
) -> Tensor:
    return _rope(input, freqs, 1, qkv_format, start_positions, interleaved, *cut)


def fused_rope_backward(
    gradient: Tensor, freqs: Tensor, start_positions: Any, qkv_format: Any, interleaved: bool, *cut: Any
) -> Tensor:
    return _rope(gradient, freqs, -1, qkv_format, start_positions, interleaved, *cut)


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: Any) -> None:
    """scale: a number, or a tensor of one."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
        overflow.fill_(max(int(overflow), int(not target.isfinite().all())))


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([x.float().norm() for x in lists[0]]) if lists[0] else torch.zeros(1)
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


def multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """lists: gradients, parameters, first and second moments and, where parameters have them, master weights."""
    assert mode == 1, "AdamW"
    for gradient, parameter, first, second, *master in zip(*lists, strict=True):
        weight = (master[0] if master else parameter).float()
        grad = gradient.float()
        first.copy_(beta1 * first.float() + (1 - beta1) * grad)
        second.copy_(beta2 * second.float() + (1 - beta2) * grad.square())
        correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        update = (first.float() / correct1) / ((second.float() / correct2).sqrt() + epsilon) + weight_decay * weight
        weight = weight - lr * update
        for target in (parameter, *master):
            target.copy_(weight)


KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        generic_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        fused_rope_forward,
        fused_rope_backward,
        multi_tensor_scale,
        multi_tensor_l2norm,
        multi_tensor_adam,
    )
} | {
    "multi_tensor_scale_tensor": multi_tensor_scale,
    "get_cublasLt_version": lambda: CUBLAS_VERSION,
    "get_cudnn_version": lambda: CUDNN_VERSION,
}
