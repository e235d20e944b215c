"""Megatron-LM's published runs on H100 beside the planner: `python -m tests.planning.golden` prints the tables.

golden.yaml has the facts. The planner's own walk through memory and time is used; what Megatron's GPT has and our
models do not (LayerNorm, no gate, learned positions, dropout, whole logits, the optimizer's state on every rank)
stands here.
"""

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from longred_megatron.families import Architecture
from longred_megatron.families.weights import PaddedRows, Replicated, Rule, column_parallel, norm, row_parallel
from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.operations import FUSED, Cost, Numbers, Operation, Tokens, Widths, fused_layer
from longred_megatron.planning.parameters import ChunkModel, buffer_elements
from longred_megatron.planning.plan import plan_stages
from longred_megatron.recipe import Phase, Recipe

FACTS = yaml.safe_load((Path(__file__).parent / "golden.yaml").read_text())
# On Hopper Transformer Engine, and torch for each thread that multiplies (the main one and backward's), takes a
# workspace of 32 MiB for cuBLAS from the allocator.
WORKSPACES = 3 * 32 * 2**20


@dataclass(frozen=True)
class Golden:
    """A case: its layout, its model and what was measured; see golden.yaml."""

    name: str
    tensor: int
    pipeline: int
    context: int
    world: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    sequence_length: int
    sequences: int
    microbatches: int
    positions: int
    gate: bool
    biases: bool
    dropout: bool
    scores: bool
    optimizer_ranks: int
    resident_bytes: int
    peak_bytes: int
    seconds: float | None
    chunks: int | None = None
    layers_per_chunk: Sequence[int] | None = None
    sequence: bool = False
    recompute: str = "none"
    qk_norm: bool = False
    tied: bool = True
    fused_loss: bool = False

    @property
    def held_out(self) -> bool:
        """Half of the cases, by a hash of the name: nothing is fitted to them."""
        return hashlib.sha256(self.name.encode()).digest()[-1] % 2 == 1

    @property
    def ffn(self) -> int:
        """Megatron's choice: 4 widths; with a gate two thirds of it, a multiple of 64."""
        return 4 * self.hidden * 2 // 3 // 64 * 64 if self.gate else 4 * self.hidden

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.sequence_length


CASES = tuple(Golden(name, **FACTS["defaults"] | facts) for name, facts in FACTS["cases"].items())


@dataclass(frozen=True)
class Gpt(Architecture):
    """Megatron's GPT: norms with biases, a MLP of four times the width with or without a gate, learned positions."""

    gate: bool = False
    positions: int = 0
    tensor: int = 1

    def layer_rules(self, index: int = 0) -> list[Rule]:
        a, hidden, ffn = self, self.hidden_size, self.intermediate_size
        query, kv = a.num_attention_heads * a.head_dim, a.num_kv_heads * a.head_dim
        norms = [norm("", name=f"norm_{i}.{what}", size=hidden) for i in (1, 2) for what in ("weight", "bias")]
        if a.qk_norm:
            norms += [norm("", name=f"qk_{i}.{what}", size=a.head_dim) for i in (1, 2) for what in ("weight", "bias")]
        rows, up = (query, kv, kv), (ffn, ffn) if a.gate else (ffn,)
        names = ("gate", "up")[-len(up) :]
        return [
            *norms,
            *column_parallel("qkv", ("q", "k", "v"), rows, hidden, "attention", bias=a.qkv_bias),
            *row_parallel("out", "out", (hidden, query), "attention", bias=a.attention_output_bias),
            *column_parallel("up", names, up, hidden, "mlp", bias=a.mlp_bias),
            *row_parallel("down", "down", (hidden, ffn), "mlp", bias=a.mlp_bias),
        ]

    def outer_rules(self, local_rows: int = 0) -> list[Rule]:
        rows = self.vocab_size + self.tensor * self.positions  # every tensor rank has all positions
        head = "head" if not self.tied_embeddings else "embedding"
        final = Rule((), {"norm.weight": (self.hidden_size,), "norm.bias": (self.hidden_size,)}, Replicated(), "norm")
        return [
            Rule((), {"embedding": (rows, self.hidden_size)}, PaddedRows(rows), "embedding"),
            final,
            Rule((), {"head": (self.vocab_size, self.hidden_size)}, PaddedRows(self.vocab_size), head),
        ]


def phase_of(case: Golden) -> Phase:
    """The case as a recipe that trains the next token."""
    model = Gpt(
        family="llama",
        hidden_size=case.hidden,
        num_layers=case.layers,
        num_attention_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.hidden // case.heads,
        intermediate_size=case.ffn,
        vocab_size=case.vocabulary,
        norm_epsilon=1e-5,
        tied_embeddings=case.tied,
        qkv_bias=case.biases,
        attention_output_bias=case.biases,
        mlp_bias=case.biases,
        qk_norm=case.qk_norm,
        rope={},
        max_position_embeddings=case.sequence_length,
        gate=case.gate,
        positions=case.positions,
        tensor=case.tensor,
    )
    parallel = {
        "tensor": case.tensor,
        "pipeline": case.pipeline,
        "context": case.context,
        "virtual_pipeline": case.chunks,
        "layers_per_chunk": case.layers_per_chunk,
        "sequence": case.sequence,
    }
    recipe = Recipe.model_validate(
        {
            "model": {"hf": "/gpt", "max_position_embeddings": case.sequence_length},
            "step": {"tokens_per_microbatch": case.tokens},
            "objectives": {
                "next_token": {
                    "microbatches": case.microbatches,
                    "sequence_length": case.sequence_length,
                    "data": "texts",
                }
            },
            "data": {"texts": {"texts": 1.0}},
            "parallel": parallel,
            "optimizer": {"lr": 1e-4},
            "training": {"steps": 1, "recompute": case.recompute},
            "run": {"dir": "/run"},
        }
    )
    return Phase(recipe, model, {})


class GoldenMemory(StageMemory):
    """The planner's walk with Megatron's layer and loss."""

    def __init__(self, case: Golden, stage: int) -> None:
        self.case = case
        super().__init__(phase_of(case), case.world, stage, replace(FUSED, layer=self._layer))

    @property
    def resident(self) -> dict[str, float]:  # type: ignore[override]
        """Optimizer's state over the ranks that share it: one, without the distributed optimizer."""
        buffers = buffer_elements(self.chunks, None, self.replicas * self.parallel.context)
        return {
            "weights": 2.0 * buffers,
            "gradients": 4.0 * buffers,
            "optimizer": 12 * buffers / self.case.optimizer_ranks,
            "workspaces": WORKSPACES,
        }

    def _layer(self, w: Widths, t: Tokens, numbers: Numbers) -> list[Operation]:
        """LayerNorm keeps a mean as well; dropout a byte a number; attention that is not fused its scores, in bf16,
        before and after their dropout."""
        case = self.case
        first, qkv, *heads, core, out, second, up, activation, down = fused_layer(w, t, numbers)
        scores = t.all * w.heads * case.sequence_length * (2 * numbers.size + 1) if case.scores else 0.0
        mask = t.own * w.hidden if case.dropout else 0.0
        first, second = (each._replace(kept=each.kept + 4 * t.own) for each in (first, second))
        core = core._replace(kept=core.kept + scores)
        out, down = (each._replace(kept=each.kept + mask) for each in (out, down))
        if not case.gate:  # the first product is half as wide
            up = up._replace(kept=up.kept / 2, output=up.output / 2)
        return [first, qkv, *heads, core, out, second, up, activation, down]

    def _table(self, tokens: Tokens, model: Architecture) -> float:
        return 0.0 if self.case.positions else super()._table(tokens, model)

    def _head_loss(self, chunk: ChunkModel, tokens: Tokens, name: str) -> Cost:
        """All logits at once, in bf16 and fp32; of the fused loss another fp32 tensor; one fp32 is kept."""
        scores = tokens.all * self.case.vocabulary / self.case.tensor
        return Cost(4 * scores, (10 if self.case.fused_loss else 6) * scores, 6 * scores)

    def _inputs(self, order: Sequence[str]) -> float:
        """Of one micro-batch: tokens, labels, positions, the fp32 weights of the loss, and a mask of a byte a pair."""
        mask = self.case.sequences * self.case.sequence_length**2
        return self.phase.sites[order[0]].rank_tokens * (3 * 8 + 4) + mask / self.case.context


@dataclass(frozen=True)
class Compared:
    """Relative errors of a case's plan. seconds: None where the case has none."""

    case: Golden
    resident: float
    peak: float
    seconds: float | None


def compare(case: Golden) -> Compared:
    """Bytes of the last stage, whose rank logged them; seconds of the whole step."""
    stages = [GoldenMemory(case, stage) for stage in range(case.pipeline)]
    last, plan = stages[-1].memory(), plan_stages(stages, case.world, read_gpu("h100-80gb"))
    resident = sum(last.resident.values()) + sum(stages[-1].left_inputs.values())
    return Compared(
        case,
        resident / case.resident_bytes - 1,
        last.peak.total / case.peak_bytes - 1,
        plan.step_seconds / case.seconds - 1 if case.seconds else None,
    )


def summary(compared: Sequence[Compared]) -> str:
    """The first table of docs/planning.md: sizes of the errors, of both halves."""
    lines = ["| cases | number | resident | peak | seconds |", "|" + " --- |" * 5]
    for name, held_out in (("held out", True), ("calibrated on", False)):
        half = [each for each in compared if each.case.held_out == held_out]
        columns = [
            [e.resident for e in half],
            [e.peak for e in half],
            [e.seconds for e in half if e.seconds is not None],
        ]
        sizes = [sorted(map(abs, column)) for column in columns]
        cells = [f"median {statistics.median(column):.1%}, worst {column[-1]:.1%}" for column in sizes]
        lines.append("| " + " | ".join([name, str(len(half)), *cells]) + " |")
    return "\n".join(lines)


def markdown(compared: Iterable[Compared]) -> str:
    """The second: every case that is held out."""
    lines = ["| held-out case | resident | peak | measured s | planned |", "|" + " --- |" * 5]
    for each in compared:
        if each.case.held_out:
            time = [f"{each.case.seconds:.3f}", f"{each.seconds:+.0%}"] if each.seconds is not None else ["", ""]
            cells = [f"`{each.case.name}`", f"{each.resident:+.1%}", f"{each.peak:+.1%}", *time]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = [compare(case) for case in CASES]
    print(summary(found), markdown(found), sep="\n\n")
