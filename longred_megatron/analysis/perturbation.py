"""Packed repeats: one token sequence several times in a window; what differs between its copies is positional.

The probe of arXiv 2604.06070. Only the first copy sees no copy of itself, so pairs with it also show what is copied.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longred_megatron.analysis.inputs import add_arguments as add_common
from longred_megatron.analysis.inputs import check_number, models_of, texts_of
from longred_megatron.analysis.measure import Ranks, Subject
from longred_megatron.analysis.network import Network
from longred_megatron.analysis.page import Study
from longred_megatron.analysis.plots import lines
from longred_megatron.analysis.token_file import TokenFile
from longred_megatron.analysis.walk import LayerValues
from longred_megatron.errors import UserError
from longred_megatron.page import Plot

KIND = "longred-megatron study of perturbation"
STATES = ("hidden", "query", "key", "value")


@dataclass(frozen=True)
class Copies:
    """Differences between copies. pairs: (first, second) copy, from 0.

    states: {what: [pairs, layers]}, 1 - cosine, mean over tokens (and heads); query and key before RoPE.
    logits: [pairs], KL(first || second) of the next token in nats, mean over tokens.
    """

    pairs: list[tuple[int, int]]
    states: dict[str, Tensor]
    logits: Tensor

    def to_json(self, block: int) -> list[dict[str, Any]]:
        return [
            {"first": a, "second": b, "distance": (b - a) * block, "logits": self.logits[i].item()}
            | {what: values[i].tolist() for what, values in self.states.items()}
            for i, (a, b) in enumerate(self.pairs)
        ]


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `tools/analyze.py perturbation`."""
    add_common(parser, "Hugging Face folders", "tokens of one copy (default: the first model's window / copies)", 8)
    parser.add_argument("--copies", type=int, default=4, metavar="N", help="copies in a window (%(default)s)")
    parser.add_argument(
        "--thetas", type=float, nargs="*", default=[], metavar="X", help="measure also with these bases of RoPE"
    )
    parser.add_argument(
        "--skips",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="also with this many positions skipped before each copy",
    )


def study(options: Namespace, ranks: Ranks) -> Study:
    """Measures each model, as it is and with each change.

    Raises:
        UserError: no model, too few copies, a theta or skip that is none, or texts too short.
    """
    models = models_of(options, KIND, ranks)
    check_number("copies", options.copies, 2)
    for skip in options.skips:
        check_number("skips", skip, 1)
    if wrong := [theta for theta in options.thetas if not 1 < theta < 1e20]:
        raise UserError(f"--thetas {wrong[0]:g}: a base of RoPE is more than 1 and less than 1e20")
    window = models[0].architecture.max_position_embeddings
    block = window // options.copies if options.length is None else options.length
    tokens = texts_of(options, models[0], block)
    found: dict[str, Copies] = {}
    entries = []
    variants = 1 + len(options.thetas) + len(options.skips)
    with ranks.bar(variants * sum(model.architecture.num_layers for model in models), tokens) as bar:
        for model in models:
            own = tokens if model is models[0] else texts_of(options, model, block)
            with model.opened() as network:
                for change, rotary, skip in _variants(network, options):
                    name = f"{model.name}, {change}" if change else model.name
                    found[name] = copy_differences(Subject(network, rotary), own, options.copies, skip, ranks, bar)
                    entries.append(model.to_json() | {"change": change, "pairs": found[name].to_json(block)})
    return Study(
        KIND,
        f"Perturbation: {', '.join(model.name for model in models)}",
        [
            f"{len(tokens)} sequences of {block:,} tokens, each {options.copies} times in a row in one window. Hidden "
            "states, queries, keys (before RoPE) and values: 1 - cosine of the same token in two copies; logits: KL.",
            "Pairs without the first copy: what differs is positional. The first copy sees no earlier one.",
        ],
        _table(found, block),
        _figures(found, block),
        {"block": block, "copies": options.copies, "models": entries},
        tokens,
    )


def _variants(network: Network, options: Namespace) -> list[tuple[str, Any, int]]:
    """(name, RoPE or the model's own, positions skipped before each copy)."""
    rope = network.config.rope_parameters
    bases = [(f"theta {theta:g}", network.rotary(rope | {"rope_theta": theta}), 0) for theta in options.thetas]
    return [("", None, 0), *bases, *[(f"skip {skip:,}", None, skip) for skip in options.skips]]


@torch.inference_mode()
def copy_differences(subject: Subject, tokens: Tensor, copies: int, skip: int, ranks: Ranks, bar: Any) -> Copies:
    """tokens: [texts, block]. skip: positions left out before each copy but the first."""
    (num_texts, block), layers = tokens.shape, subject.network.architecture.num_layers
    pairs = list(combinations(range(copies), 2))
    positions = torch.arange(copies * block) + skip * torch.arange(copies).repeat_interleave(block)
    sums = {what: torch.zeros(len(pairs), layers, dtype=torch.float64) for what in STATES}
    logits = torch.zeros(len(pairs), dtype=torch.float64)
    with ExitStack() as stack:
        kept = {what: stack.enter_context(TokenFile()) for what in STATES}  # of one text and layer
        for values in subject.walk(ranks.part(tokens).repeat(1, copies), positions):
            states = {what: _rows(values, what) for what in STATES}
            for what, rows in states.items():
                kept[what].write(values.start, rows)
            for i, (a, b) in enumerate(pairs):
                start, stop = max(values.start, b * block), min(values.tokens.stop, (b + 1) * block)
                if start >= stop:  # the piece has none of the second copy's tokens
                    continue
                back = (b - a) * block
                first = {what: file.read(start - back, stop - back) for what, file in kept.items()}
                second = {what: rows[start - values.start : stop - values.start] for what, rows in states.items()}
                for what in STATES:
                    cosine = F.cosine_similarity(first[what].float(), second[what].float(), dim=-1)
                    sums[what][i, values.layer - 1] += (1 - cosine).sum().item() / (cosine.numel() // len(cosine))
                if values.layer == layers:
                    logits[i] += _logit_divergence(subject.network, first["hidden"], second["hidden"])
            if values.tokens.stop == copies * block:
                bar.update()
    num_tokens = num_texts * block
    means = {what: ranks.total(each) / num_tokens for what, each in sums.items()}
    return Copies(pairs, means, ranks.total(logits) / num_tokens)


def _rows(values: LayerValues, what: str) -> Tensor:
    """[p, hidden], or [p, heads, head_dim] before RoPE."""
    return values.hidden if what == "hidden" else values.before_rope(what).transpose(0, 1)


def _logit_divergence(network: Network, first: Tensor, second: Tensor) -> float:
    """Sum of KL(first || second) of hidden states [p, hidden] through the head."""
    p, q = (network.head(each).float().log_softmax(-1) for each in (first, second))
    return (p.exp() * (p - q)).sum().item()


def _far_pairs(copies: Copies) -> list[int]:
    """Without the first copy, where there are others."""
    return [i for i, (a, _) in enumerate(copies.pairs) if a > 0] or list(range(len(copies.pairs)))


def _table(found: dict[str, Copies], block: int) -> list[list[str]]:
    rows = [["model", "copies", "distance", "logits KL", *(f"{what}" for what in STATES)]]
    for name, copies in found.items():
        for i, (a, b) in enumerate(copies.pairs):
            states = [f"{copies.states[what][i].mean():.4f}" for what in STATES]
            rows.append([name, f"{a + 1}, {b + 1}", f"{(b - a) * block:,}", f"{copies.logits[i]:.4f}", *states])
    return rows


def _figures(found: dict[str, Copies], block: int) -> list[Plot]:
    layers = {
        what: {name: _by_layer(copies, what) for name, copies in found.items()} for what in ("hidden", "query", "key")
    }
    distance = {
        "logits KL (nats)": {name: _by_distance(copies, copies.logits, block) for name, copies in found.items()},
        "last hidden state": {
            name: _by_distance(copies, copies.states["hidden"][:, -1], block) for name, copies in found.items()
        },
    }
    return [
        lines(
            layers,
            "by-layer",
            "layer",
            "1 - cosine of the same token in two copies, without the first copy. Where it rises, position enters the "
            "stream; a layer that rises steeply is one to distil.",
        ),
        lines(
            distance,
            "by-distance",
            "distance of the copies (tokens)",
            "How much position reaches the output. If a change of theta or of position ids lifts the line, the model "
            "does not take these distances yet.",
        ),
    ]


def _by_layer(copies: Copies, what: str) -> tuple[list[int], list[float]]:
    values = copies.states[what][_far_pairs(copies)].mean(0).tolist()
    return list(range(1, len(values) + 1)), values


def _by_distance(copies: Copies, values: Tensor, block: int) -> tuple[Sequence[int], list[float]]:
    """Mean over the pairs of one distance."""
    by: dict[int, list[float]] = {}
    for i in _far_pairs(copies):
        a, b = copies.pairs[i]
        by.setdefault((b - a) * block, []).append(values[i].item())
    distances = sorted(by)
    return distances, [sum(by[d]) / len(by[d]) for d in distances]
