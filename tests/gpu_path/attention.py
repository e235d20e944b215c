"""Transformer Engine's fused attention in plain torch: forward with the softmax statistics, backward from them.

The ring of context parallelism runs the forward pass on blocks and joins their outputs by the statistics, and runs the
backward pass of each block with the statistics of all: so they are given and used here as cuDNN's kernel does.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.gpu_path.kernels import cast, plain


class Block(NamedTuple):
    """Rows of queries and keys of one sequence or document. They are views: what is written there is kept."""

    tensors: list[Tensor]  # each [tokens, heads or kv_heads, head_dim]
    row: int  # of the batch
    queries: slice  # in the whole of a packed micro-batch, or in the sequence


def blocks(layout: str, cu: Sequence[Tensor | None], queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator:
    """The sequences of [batch, seq, ...] or [seq, batch, ...] tensors, the documents of [tokens, ...] ones."""
    cu_q, cu_k, padded_q, padded_k = cu
    if layout == "thd":
        starts = [(p if p is not None else c).tolist() for c, p in ((cu_q, padded_q), (cu_k, padded_k))]
        assert starts[0][-1] == queries[0].shape[0] and starts[1][-1] == keys[0].shape[0], "borders end with the tokens"
        counts = [c.diff().tolist() for c in (cu_q, cu_k)]
        for row, (q, k, num_q, num_k) in enumerate(zip(starts[0][:-1], starts[1][:-1], *counts, strict=True)):
            tensors = [x[q : q + num_q] for x in queries] + [x[k : k + num_k] for x in keys]
            yield Block(tensors, row, slice(q, q + num_q))
        return
    dim = layout.index("b")
    for row in range(queries[0].shape[dim]):
        yield Block([x.select(dim, row) for x in (*queries, *keys)], row, slice(0, queries[0].shape[1 - dim]))


def scores(query: Tensor, key: Tensor, scale: float, mask: str) -> Tensor:
    """[heads, queries, keys]; minus infinity where a query does not see a key."""
    groups = query.shape[1] // key.shape[1]
    out = torch.einsum("qhd,khd->hqk", query.float(), key.float().repeat_interleave(groups, 1)) * scale
    num_queries, num_keys = out.shape[1:]
    if "CAUSAL" in mask:
        ahead = num_keys - num_queries if "BOTTOM_RIGHT" in mask else 0
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(ahead)
        out = out.masked_fill(~seen, float("-inf"))
    return out


def _formats(qkv_layout: Any) -> tuple[str, str]:
    parts = qkv_layout.name.removeprefix("NVTE_").lower().split("_")
    assert len(parts) == 3 and parts[1] == parts[2], qkv_layout
    return parts[0], parts[1]


def _check(bias: Any, softmax: Any, window: Sequence[int], mask: Any, dropout: float) -> str:
    assert bias.name == "NVTE_NO_BIAS" and softmax.name == "NVTE_VANILLA_SOFTMAX" and dropout == 0
    assert tuple(window) in {(-1, -1), (-1, 0 if "CAUSAL" in mask.name else -1)}, (window, mask)
    return mask.name


def fused_attn_fwd(
    max_q: int, max_kv: int, is_training: bool, scale: float, dropout: float, zero: bool,
    qkv_layout: Any, o_format: Any, scale_format: Any, bias_type: Any, mask_type: Any, softmax_type: Any,
    window: Sequence[int], bottom_right: bool, cu_q: Tensor, cu_k: Tensor, q: Any, k: Any, v: Any, dtype: torch.dtype,
    padded_q: Tensor | None, padded_k: Tensor | None, page_k: None, page_v: None, s_quantizer: Any, o_quantizer: Any,
    bias: None, offset: None, generator: Any, rng_elements: int, max_logit: bool, cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    mask = _check(bias_type, softmax_type, window, mask_type, dropout)
    q_format, k_format = _formats(qkv_layout)
    assert q_format == k_format and o_format.name == f"NVTE_{q_format.upper()}" and not max_logit
    q, k, v = plain(q), plain(k), plain(v)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=dtype)
    packed = q_format == "thd"
    batch = 0 if packed else q.shape[q_format.index("b")]
    heads = q.shape[-2]
    # Rows that no document has keep statistics of minus infinity: a fault there shows as NaN and not as a small error.
    shape = (q.shape[0], heads, 1) if packed else (batch, heads, q.shape[1 - q_format.index("b")], 1)
    stats = torch.full(shape, float("-inf"))
    for block in blocks(q_format, (cu_q, cu_k, padded_q, padded_k), (q, out), (k, v)):
        query, rows, key, value = block.tensors
        logits = scores(query, key, scale, mask)
        groups = query.shape[1] // value.shape[1]
        attended = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value.float().repeat_interleave(groups, 1))
        rows.copy_(attended.to(dtype))
        sums = logits.logsumexp(-1)  # [heads, queries]
        if packed:
            stats[block.queries, :, 0] = sums.T
        else:
            stats[block.row, :, :, 0] = sums
    return [cast(out, o_quantizer), stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int, max_kv: int, scale: float, dropout: float, zero: bool, qkv_layout: Any, o_format: Any, do_format: Any,
    dqkv_layout: Any, scale_format: Any, do_scale_format: Any, bias_type: Any, mask_type: Any, softmax_type: Any,
    window: Sequence[int], bottom_right: bool, deterministic: bool, cu_q: Tensor, cu_k: Tensor,
    q: Any, k: Any, v: Any, out: Any, d_out: Any, dtype: torch.dtype, aux: Sequence[Tensor],
    padded_q: Tensor | None, padded_k: Tensor | None, s_quantizer: Any, dp_quantizer: Any, dqkv_quantizer: Any,
    cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    mask = _check(bias_type, softmax_type, window, mask_type, dropout)
    layout, _ = _formats(qkv_layout)
    packed, stats = layout == "thd", aux[0]
    q, k, v, out, d_out = (plain(x) for x in (q, k, v, out, d_out))
    gradients = [torch.zeros(x.shape, dtype=dtype) for x in (q, k, v)]
    d_q, d_k, d_v = gradients
    # The ring hands statistics without their last dim of one.
    stats = stats.reshape(q.shape[0], -1) if packed else stats.reshape(*stats.shape[:2], -1)
    queries, keys = (q, out, d_out.reshape(out.shape), d_q), (k, v, d_k, d_v)
    for block in blocks(layout, (cu_q, cu_k, padded_q, padded_k), queries, keys):
        query, output, d_output, d_query, key, value, d_key, d_value = block.tensors
        sums = stats[block.queries].T if packed else stats[block.row]
        probabilities = (scores(query, key, scale, mask) - sums[..., None]).exp()
        kv_heads = key.shape[1]
        groups = query.shape[1] // kv_heads
        wide_key, wide_value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
        d_probabilities = torch.einsum("qhd,khd->hqk", d_output.float(), wide_value)
        shift = (d_output.float() * output.float()).sum(-1).T[..., None]
        d_scores = probabilities * (d_probabilities - shift) * scale
        d_query.copy_(torch.einsum("hqk,khd->qhd", d_scores, wide_key))
        for target, weights, x in ((d_key, d_scores, query), (d_value, probabilities, d_output)):
            each = torch.einsum("hqk,qhd->khd", weights, x.float())
            target.copy_(each.unflatten(1, (kv_heads, groups)).sum(2))
    return [*(cast(x, dqkv_quantizer) for x in gradients), None, None]


def get_fused_attn_backend(params: Any) -> tuple[Any, str]:
    """Which kernel cuDNN would take: one for FP8, and one for 16 bits, in whose place fp32 is let through here."""
    import transformer_engine_torch as tex

    backends = tex.NVTE_Fused_Attn_Backend
    fp8 = params.qkv_dtype.name.startswith("kFloat8")
    return backends.NVTE_FP8 if fp8 else backends.NVTE_F16_arbitrary_seqlen, ""


KERNELS = {function.__name__: function for function in (fused_attn_fwd, fused_attn_bwd, get_fused_attn_backend)}
