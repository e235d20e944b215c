"""Relations of LinearARD (arXiv 2604.00004): which tokens a token's query, key and value resemble stays as it was."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from longred_megatron.kernels.relation_divergence import relation_divergence, working_bytes
from longred_megatron.objectives.base import Activations, Batch, Groups, Layers, Needs, Objective, Site, Tap, Term
from longred_megatron.objectives.shared import natural_batch, size_problems


class Relations(Objective):
    """Relations of queries, of keys and of values against the teacher's: (1/layers) * sum over layers of the sum of the
    three of KL(teacher || student), each a mean over heads and tokens of a causal row-wise softmax.
    """

    kind: Literal["relations"] = "relations"
    layers: Layers = Field(description="compared layers, numbered from 1; the paper: all of them")

    def own_problems(self, where: str, site: Site) -> Iterator[str]:
        compared = {
            "num_attention_heads": "heads",
            "num_kv_heads": "key/value heads",
            "num_layers": "layers",
            "vocab_size": "token ids",
        }
        return size_problems(where, compared, site)

    def needs(self, site: Site) -> Needs:
        taps = [Tap(layer, what) for layer in self.layers for what in ("query", "key", "value")]
        return Needs(pairs={tap: tap for tap in taps})

    def batch(self, samples: Sequence[Any], generator: Generator, site: Site) -> Batch:
        return natural_batch(samples)

    def loss(self, student: Activations, teacher: Activations, batch: Batch, groups: Groups) -> list[Term]:
        terms = []
        for tap, ours in student.taps.items():
            num_heads = ours.shape[2] * groups.tp.size()
            total = self._divergence(ours, teacher.taps[tap], len(batch.tokens), groups)
            share = total / (batch.num_valid_tokens * num_heads * len(self.layers))
            terms.append(Term(share, "split over tensor ranks", f"layer_{tap.layer}/{tap.what}"))
        return terms

    def _divergence(self, ours: Tensor, theirs: Tensor, num_sequences: int, groups: Groups) -> Tensor:
        """Summed over this rank's heads and tokens. ours, theirs: [tokens, 1, heads, head_dim]."""
        size = groups.cp.size()
        if size == 1 or self.whole_sequences:
            a, b = (x.view(num_sequences, self.sequence_length, *x.shape[2:]) for x in (ours, theirs))
            return relation_divergence(a, b)
        from longred_megatron.parallel.context import gather_sequences, pieces  # imports Megatron: slow, and only here

        # Context-parallel group: its ranks hold the other tokens of the sequences.
        a, b = (gather_sequences(x, num_sequences, groups.cp) for x in (ours, theirs))
        parts = [
            relation_divergence(a[:, start:stop], b[:, start:stop], a[:, :stop], b[:, :stop], first_row=start)
            for start, stop in pieces(self.sequence_length, groups.cp.rank(), size)
        ]
        return torch.stack(parts).sum()

    def working_bytes(self, site: Site) -> float:
        cut = 1 if self.whole_sequences else site.parallel.context
        heads = site.student.num_attention_heads / site.parallel.tensor
        sequences = site.rank_tokens * cut / self.sequence_length
        return working_bytes(sequences, heads, self.sequence_length / cut, self.sequence_length)

    def own_flops(self, site: Site) -> float:
        """Four matrix products over the causal half of each head's relations; see the kernel."""
        heads = site.student.num_attention_heads + 2 * site.student.num_kv_heads
        pairs = site.tokens_per_microbatch * self.sequence_length / 2
        return len(self.layers) * heads * 4 * 2 * site.student.head_dim * pairs
