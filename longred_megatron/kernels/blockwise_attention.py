"""Causal attention of some of a text's tokens on keys and values that come block by block."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def blockwise_attention(query: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], scale: float, start: int) -> Tensor:
    """Each query's mean of the values, [heads, tokens, head_dim] in the query's dtype, weighted with
        softmax over keys j = 0 ... start + i of (scale * query_i . key_j).

    - query: [heads, tokens, head_dim], after RoPE. scale: of the scores.
    - blocks: keys and values of the text's tokens in order, [key/value heads, some tokens, head_dim] each, up to the
      last query's. Each key/value head is shared by heads / key/value heads queries in a row.
    - start: of the first query, among the text's tokens.

    A running softmax (arXiv 2112.05682) in fp32: of scores, those of one key/value head and one block exist. No
    gradient.
    """
    heads: list[_Head] = []
    first = 0
    for keys, values in blocks:
        heads = heads or [_Head(x * scale, start) for x in query.float().unflatten(0, (len(keys), -1))]
        for head, key, value in zip(heads, keys.float(), values.float(), strict=True):
            head.add(key, value, first)
        first += keys.shape[1]
    return torch.cat([head.mean() for head in heads]).to(query.dtype)


class _Head:
    """The queries that share a key/value head: over the keys so far, sums of exp(score - largest) and its products."""

    def __init__(self, query: Tensor, start: int) -> None:
        """query: [queries, tokens, head_dim], of the tokens from `start` on."""
        self._shape, self._start = query.shape, start
        rows = torch.arange(start, start + query.shape[1], device=query.device)
        self._query, self._rows = query.flatten(0, 1), rows.repeat(len(query))[:, None]
        self._largest = query.new_full((len(self._rows),), -math.inf)
        self._total, self._sum = torch.zeros_like(self._largest), torch.zeros_like(self._query)

    def add(self, key: Tensor, value: Tensor, first: int) -> None:
        """A block, [keys, head_dim] each, that begins at token `first`."""
        scores = self._query @ key.t()
        if first + len(key) - 1 > self._start:
            unseen = torch.arange(first, first + len(key), device=key.device) > self._rows
            scores.masked_fill_(unseen, -math.inf)
        largest = torch.maximum(self._largest, scores.amax(-1))  # finite: every query sees the first block's first key
        kept = (self._largest - largest).exp_()
        shares = scores.sub_(largest[:, None]).exp_()
        self._total = self._total * kept + shares.sum(-1)
        self._sum.mul_(kept[:, None]).addmm_(shares, value)
        self._largest = largest

    def mean(self) -> Tensor:
        return (self._sum / self._total[:, None]).unflatten(0, self._shape[:2])
