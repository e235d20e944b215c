"""What training changed in queries, keys and values and in their weights, by layer, head and RoPE frequency band."""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longred_megatron.analysis.inputs import add_arguments as add_common
from longred_megatron.analysis.inputs import check_comparable, models_of, texts_of
from longred_megatron.analysis.measure import Ranks, Subject
from longred_megatron.analysis.network import Network
from longred_megatron.analysis.page import Study
from longred_megatron.analysis.plots import grids, lines
from longred_megatron.errors import UserError
from longred_megatron.page import Plot
from longred_megatron.rope.frequencies import inverse_frequencies

KIND = "longred-megatron study of query states"
STATES = ("query", "key", "value")
ROTATED = ("rotated query", "rotated key")  # as attention sees them: a change of RoPE shows here without any training
NUM_SPANS = 20
FAR = 0.9  # a span's bands changed more than this share of all bands


@dataclass(frozen=True)
class Change:
    """Of one kind of values. squares, differences: [layers, heads, bands], sums of x^2 before, of (after - before)^2.

    A band is a pair of dims that RoPE turns together, the fastest first; of values and value weights, the same dims.
    """

    squares: Tensor
    differences: Tensor

    def relative(self, *dims: int) -> Tensor:
        """|after - before| / |before|, over the summed-up dims."""
        differences, squares = self.differences, self.squares
        if dims:
            differences, squares = differences.sum(dims), squares.sum(dims)
        return (differences / squares.clamp(min=1e-30)).sqrt()

    def spans(self) -> list[dict[str, Any]]:
        """Runs of neighbouring bands of a head that changed much more than most, the largest change first."""
        relative, share = self.relative(), self.differences / self.differences.sum().clamp(min=1e-30)
        far = (relative >= relative.quantile(FAR)) & (self.differences > 0)
        found = []
        for layer, head in far.any(-1).nonzero().tolist():
            bands = far[layer, head].nonzero().flatten().tolist()
            runs = [[bands[0], bands[0]]]
            for band in bands[1:]:
                if band == runs[-1][1] + 1:
                    runs[-1][1] = band
                else:
                    runs.append([band, band])
            for start, stop in runs:
                run = slice(start, stop + 1)
                change = (self.differences[layer, head, run].sum() / self.squares[layer, head, run].sum()).sqrt().item()
                of_all = share[layer, head, run].sum().item()
                found.append({"layer": layer + 1, "head": head + 1, "bands": [start, stop], "change": change,
                              "share": of_all})  # fmt: skip
        return sorted(found, key=lambda each: -each["share"])[:NUM_SPANS]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.relative(1, 2).tolist(),
            "heads": self.relative(2).tolist(),
            "bands": self.relative(1).tolist(),
            "mean": self.relative(0, 1, 2).item(),
            "spans": self.spans(),
        }


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `tools/analyze.py query-states`."""
    add_common(
        parser,
        "two Hugging Face folders: before and after; or one, and a run, whose newest checkpoint is after",
        "tokens of a text (default: the first model's window, at most 8,192)",
        16,
    )


def study(options: Namespace, ranks: Ranks) -> Study:
    """Compares two models on the same texts.

    Raises:
        UserError: not two models, they cannot be compared, a run without checkpoints, or texts too short.
    """
    models = models_of(options, KIND, ranks)
    if len(options.hf) + len(options.runs) != 2:
        raise UserError(
            f"{len(options.hf)} folders at --hf, {len(options.runs)} at --runs: give two models, before and after"
        )
    before, after = models[0], models[-1]
    check_comparable([before, after])
    window = before.architecture.max_position_embeddings
    length = min(window, 8192) if options.length is None else options.length
    tokens = texts_of(options, before, length)
    architecture = before.architecture
    with before.opened() as ours, after.opened() as theirs:
        with ranks.bar(architecture.num_layers, tokens) as bar:
            changes = state_changes(Subject(ours), Subject(theirs), tokens, ranks, bar)
        changes |= weight_changes(ours, theirs)
    frequencies, _ = inverse_frequencies(architecture.rope, architecture.head_dim, window)
    wavelengths = (2 * math.pi / frequencies).tolist()
    return Study(
        KIND,
        f"Query states: {before.name} to {after.name}",
        [
            f"|after - before| / |before| over {len(tokens)} texts of {tokens.shape[1]:,} tokens. Query, key and "
            "value: before RoPE; rotated: after it, as attention sees them. Weight: of the projections.",
            f"A band is a pair of dims that RoPE turns together, {len(wavelengths)} a head: the first once in "
            f"{wavelengths[0]:.0f} tokens, the last once in {wavelengths[-1]:,.0f}.",
        ],
        _table(changes, wavelengths),
        _figures(changes),
        {
            "before": before.to_json(),
            "after": after.to_json(),
            "wavelengths": wavelengths,
            "changes": {what: change.to_json() for what, change in changes.items()},
        },
        tokens,
    )


@torch.inference_mode()
def state_changes(before: Subject, after: Subject, tokens: Tensor, ranks: Ranks, bar: Any) -> dict[str, Change]:
    """By `STATES` and `ROTATED`, over tokens [texts, length]; a piece of a layer of both models at a time."""
    a, own = before.network.architecture, ranks.part(tokens)
    sums = {}
    for what in (*STATES, *ROTATED):  # also on a rank without texts
        heads = a.num_attention_heads if "query" in what else a.num_kv_heads
        sums[what] = [torch.zeros(a.num_layers, heads, a.head_dim // 2, dtype=torch.float64) for _ in range(2)]
    for ours, theirs in zip(before.walk(own), after.walk(own), strict=True):
        for what in (*STATES, *ROTATED):
            name = what.removeprefix("rotated ")
            x, y = (
                getattr(each, name) if what in ROTATED else each.before_rope(name).to(each.query.dtype)
                for each in (ours, theirs)
            )  # [heads, tokens, head_dim]
            squares = _by_band(x.float().square().sum(1)), _by_band((y.float() - x.float()).square().sum(1))
            for total, part in zip(sums[what], squares, strict=True):
                total[ours.layer - 1] += part.double().cpu()
        if ours.tokens.stop == tokens.shape[1]:
            bar.update()
    return {what: Change(*(ranks.total(each) for each in pair)) for what, pair in sums.items()}


def weight_changes(before: Network, after: Network) -> dict[str, Change]:
    """Of the projections' weights, by `STATES` with " weight" behind; bands are of their rows."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for number in range(1, before.architecture.num_layers + 1):
        ours, theirs = before.layer(number), after.layer(number)
        pairs = zip(STATES, _projections(ours.self_attn), _projections(theirs.self_attn), strict=True)
        for what, x, y in pairs:
            rows = x.detach().double().cpu(), (y.detach().double() - x.detach().double()).cpu()
            squares, differences = (
                _by_band(each.square().sum(1).unflatten(0, (-1, ours.self_attn.head_dim))) for each in rows
            )
            found.setdefault(f"{what} weight", []).append((squares, differences))
    return {what: Change(*(torch.stack(each) for each in zip(*pairs, strict=True))) for what, pairs in found.items()}


def _projections(attention: Any) -> tuple[Tensor, ...]:
    """Weights of query, key and value, [heads * head_dim, hidden] each; Phi-3 has the three in one."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    return attention.qkv_proj.weight.split([n * attention.head_dim for n in (heads, kv_heads, kv_heads)])


def _by_band(values: Tensor) -> Tensor:
    """[heads, head_dim] -> [heads, head_dim / 2]: RoPE turns dim i with dim i + head_dim / 2."""
    return values.unflatten(1, (2, -1)).sum(1)


def _table(changes: dict[str, Change], wavelengths: list[float]) -> list[list[str]]:
    rows = [["what", "change", "most changed layer", "most changed span", "turns once in (tokens)", "its change"]]
    for what, change in changes.items():
        layers, spans = change.relative(1, 2), change.spans()
        row = [what, f"{change.relative(0, 1, 2):.4f}", f"{int(layers.argmax()) + 1}: {layers.max():.4f}"]
        if spans:
            first, last = spans[0]["bands"]
            place = f"layer {spans[0]['layer']} head {spans[0]['head']} bands {first}-{last}"
            row += [place, f"{wavelengths[first]:.0f}-{wavelengths[last]:.0f}", f"{spans[0]['change']:.4f}"]
        rows.append(row + [""] * (6 - len(row)))
    return rows


def _figures(changes: dict[str, Change]) -> list[Plot]:
    by_layer = {}
    for title, names in (("states", (*STATES, *ROTATED)), ("weights", [f"{what} weight" for what in STATES])):
        relative = {what: changes[what].relative(1, 2).tolist() for what in names}
        by_layer[title] = {what: (list(range(1, len(values) + 1)), values) for what, values in relative.items()}
    rows = {what: changes[what].relative(1) for what in ("query", "key")}
    heads = {what: changes[what].relative(2) for what in ("query", "key")}
    return [
        lines(
            by_layer,
            "by-layer",
            "layer",
            "Relative change of each layer. Where it is large, restoration of that layer has most to hold; where it is "
            "small, distilling it buys little.",
        ),
        grids(
            rows,
            "bands",
            ("band, fast to slow", "layer"),
            "Relative change by RoPE frequency. Slow bands tell far positions apart, fast ones near ones. Much change "
            "in the fast ones is change at short range: look at the short-text scores.",
            first_column=0,
        ),
        grids(
            heads,
            "heads",
            ("head", "layer"),
            "Relative change by head. If a few heads hold most of it, try training the attention alone.",
        ),
    ]
