"""How far one causal attention is from another, in memory linear in the length."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BLOCK_ROWS = 128  # queries whose scores on one block of keys exist at once, of all heads of one sequence
NO_PROBABILITY = -1e30  # a score of a key that is not seen; finite, so that the difference of two is 0 and not NaN


def attention_divergence(
    query: Tensor,
    keys: Iterable[Tensor],
    other_query: Tensor,
    other_keys: Iterable[Tensor],
    scale: float | None = None,
    other_scale: float | None = None,
    start: int = 0,
) -> Tensor:
    """KL(p || q) of each query, in nats, [heads, tokens] in fp64, where
        p[i] = softmax over keys j = 0 ... start + i of (scale * query_i . key_j)
    and q the same of the other attention.

    - query, other_query: [heads, tokens, head_dim], after RoPE.
    - keys, other_keys: of the text's tokens in order, in blocks of [key/value heads, some tokens, head_dim], up to the
      last query's. The two may differ in these heads and in head_dim.
    - scale: of the scores; None: 1 / sqrt(head_dim).
    - start: of the first query, among the text's tokens.

    With s and t the scores, KL = (sum of p * (s - t)) - logsumexp(s) + logsumexp(t): three running sums a query, over
    blocks of keys. Scores are fp32, the sums fp64, so that two equal attentions give exactly 0 and differences of 1e-5
    nats are not lost. No gradient.

    Raises ValueError when the two differ in heads, tokens or blocks of keys.
    """
    if query.shape[:2] != other_query.shape[:2]:
        raise ValueError(f"query {list(query.shape)} and other_query {list(other_query.shape)} differ")
    scale = query.shape[2] ** -0.5 if scale is None else scale
    other_scale = other_query.shape[2] ** -0.5 if other_scale is None else other_scale
    queries = (query.float() * scale).split(BLOCK_ROWS, 1), (other_query.float() * other_scale).split(BLOCK_ROWS, 1)
    first, scratch = 0, _Scratch(query.device)
    with torch.no_grad():
        rows = [_Rows(*pair, start + i * BLOCK_ROWS) for i, pair in enumerate(zip(*queries, strict=True))]
        for key, other_key in zip(keys, other_keys, strict=True):
            if key.shape[1] != other_key.shape[1]:
                raise ValueError(f"keys {list(key.shape)} and other_keys {list(other_key.shape)} differ")
            blocks = key.float(), other_key.float()
            for each in rows:
                each.add(*blocks, first, scratch)
            first += key.shape[1]
        return torch.cat([each.divergence() for each in rows], dim=1)


class _Scratch:
    """Memory for blocks of scores: made anew for each, it would be given back to the system and cleared every time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """What is in it is that of the last block."""
        size = math.prod(shape)
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._kept[name][:size].view(*shape)


class _Rows:
    """Some queries of both attentions, over the keys so far."""

    def __init__(self, query: Tensor, other_query: Tensor, start: int) -> None:
        """[heads, rows, head_dim] each, of the tokens from `start` on."""
        self._queries = query, other_query
        self._p, self._q = (_Running(query.shape[:2], query.device) for _ in range(2))
        self._places = torch.arange(start, start + query.shape[1], device=query.device)[:, None]
        self._start, self._stop = start, start + query.shape[1]

    def add(self, key: Tensor, other_key: Tensor, first: int, scratch: _Scratch) -> None:
        """Blocks in fp32 that begin at token `first`."""
        count = min(key.shape[1], self._stop - first)  # no query here sees more
        if count <= 0:
            return
        shape = *self._queries[0].shape[:2], count
        s, t, difference = (scratch.get(name, shape) for name in ("ours", "theirs", "difference"))
        unseen = None
        if first + count - 1 > self._start:
            unseen = torch.arange(first, first + count, device=key.device) > self._places
        for query, k, scores in zip(self._queries, (key, other_key), (s, t), strict=True):
            # each key/value head is shared by heads / kv_heads queries in a row
            shared, out = query.unflatten(0, (len(k), -1)), scores.unflatten(0, (len(k), -1))
            torch.matmul(shared, k[:, None, :count].transpose(2, 3), out=out)
            if unseen is not None:
                scores.masked_fill_(unseen, NO_PROBABILITY)
        torch.sub(s, t, out=difference)
        wide = scratch.get("wide", shape, torch.float64)
        self._p.add(s, difference, wide)
        self._q.add(t, None, wide)

    def divergence(self) -> Tensor:
        """[heads, rows]."""
        return self._p.mean() - self._p.log_sum() + self._q.log_sum()


class _Running:
    """Of each row: sum over keys of exp(s - largest), and of exp(s - largest) * value."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self._largest = torch.full(shape, -math.inf, device=device)
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._weighted = torch.zeros_like(self._total)

    def add(self, scores: Tensor, values: Tensor | None, wide: Tensor) -> None:
        """A block of keys, [heads, rows, keys] each; all three are written over."""
        largest = torch.maximum(self._largest, scores.amax(-1))
        kept = (self._largest - largest).double().exp()
        shares = scores.sub_(largest[..., None]).exp_()
        self._total = self._total * kept + wide.copy_(shares).sum(-1)
        if values is not None:
            self._weighted = self._weighted * kept + wide.copy_(shares.mul_(values)).sum(-1)
        self._largest = largest

    def log_sum(self) -> Tensor:
        return self._largest.double() + self._total.log()

    def mean(self) -> Tensor:
        return self._weighted / self._total
