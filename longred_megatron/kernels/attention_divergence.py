"""How far one causal attention is from another, in memory linear in the length."""

import math

import torch
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 256, 1024  # queries and keys whose scores exist at once, of all heads of one sequence
NO_PROBABILITY = -1e30  # a score of a key that is not seen; finite, so that the difference of two is 0 and not NaN


def attention_divergence(
    query: Tensor,
    key: Tensor,
    other_query: Tensor,
    other_key: Tensor,
    scale: float | None = None,
    other_scale: float | None = None,
) -> Tensor:
    """KL(p || q) of each query, in nats, [sequences, heads, tokens] in fp64, where
        p[i] = softmax over keys j = 0 ... i of (scale * query_i . key_j)
    and q the same of the other attention. Where keys are more than queries, the queries are of the last tokens.

    - query, other_query: [sequences, heads, tokens, head_dim], after RoPE.
    - key, other_key: [sequences, key/value heads, keys, head_dim]. The two may differ in these heads and in head_dim.
    - scale: of the scores; None: 1 / sqrt(head_dim).

    With s and t the scores, KL = (sum of p * (s - t)) - logsumexp(s) + logsumexp(t): three running sums a query, over
    blocks of keys. Scores are fp32, the sums fp64, so that two equal attentions give exactly 0 and differences of 1e-5
    nats are not lost. No gradient.

    Raises ValueError when the two differ in sequences, heads, tokens or keys.
    """
    if query.shape[:3] != other_query.shape[:3]:
        raise ValueError(f"query {list(query.shape)} and other_query {list(other_query.shape)} differ")
    if key.shape[2] != other_key.shape[2]:
        raise ValueError(f"key {list(key.shape)} and other_key {list(other_key.shape)} differ")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    other_scale = other_query.shape[3] ** -0.5 if other_scale is None else other_scale
    sequences, heads, length, _ = query.shape
    before = key.shape[2] - length
    found = torch.empty(sequences, heads, length, dtype=torch.float64, device=query.device)
    with torch.no_grad():
        for i in range(sequences):
            for start in range(0, length, BLOCK_ROWS):
                stop = min(start + BLOCK_ROWS, length)
                ours = query[i, :, start:stop].float() * scale, key[i, :, : before + stop]
                theirs = other_query[i, :, start:stop].float() * other_scale, other_key[i, :, : before + stop]
                found[i, :, start:stop] = _of_rows(*ours, *theirs, before + start)
    return found


def _of_rows(query: Tensor, key: Tensor, other_query: Tensor, other_key: Tensor, start: int) -> Tensor:
    """[heads, rows] of the queries from `start` on; the last key is that of the last query."""
    p, q = (_Running(query.shape[:2], query.device) for _ in range(2))
    rows = torch.arange(start, start + query.shape[1], device=query.device)[:, None]
    for first in range(0, key.shape[1], BLOCK_COLUMNS):
        stop = min(first + BLOCK_COLUMNS, key.shape[1])
        s, t = _scores(query, key[:, first:stop]), _scores(other_query, other_key[:, first:stop])
        if stop - 1 > start:
            unseen = torch.arange(first, stop, device=query.device) > rows
            s, t = s.masked_fill_(unseen, NO_PROBABILITY), t.masked_fill_(unseen, NO_PROBABILITY)
        p.add(s, s - t)
        q.add(t, None)
    return p.mean() - p.log_sum() + q.log_sum()


class _Running:
    """Of each row: sum over keys of exp(s - largest), and of exp(s - largest) * value."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self._largest = torch.full(shape, -math.inf, device=device)
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._weighted = torch.zeros_like(self._total)

    def add(self, scores: Tensor, values: Tensor | None) -> None:
        """A block of keys, [heads, rows, keys] each."""
        largest = torch.maximum(self._largest, scores.amax(-1))
        kept = (self._largest - largest).double().exp()
        shares = (scores - largest[..., None]).exp_()
        self._total = self._total * kept + shares.sum(-1, dtype=torch.float64)
        if values is not None:
            self._weighted = self._weighted * kept + shares.mul_(values).sum(-1, dtype=torch.float64)
        self._largest = largest

    def log_sum(self) -> Tensor:
        return self._largest.double() + self._total.log()

    def mean(self) -> Tensor:
        return self._weighted / self._total


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """[heads, rows, keys] in fp32; each key/value head is shared by heads / kv_heads queries in a row."""
    shared = query.unflatten(0, (key.shape[0], -1))
    return (shared @ key.float()[:, None].transpose(2, 3)).flatten(0, 1)
