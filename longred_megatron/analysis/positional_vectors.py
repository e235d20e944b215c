"""Positional vectors: what a hidden state owes to its position alone, in and outside of the original window.

The mean over texts of the hidden state at each position, minus the mean over all positions (LongReD, arXiv 2502.07365).
"""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longred_megatron.analysis.inputs import Model, check_layers, check_number, models_of, texts_of
from longred_megatron.analysis.inputs import add_arguments as add_common
from longred_megatron.analysis.measure import Ranks, Subject
from longred_megatron.analysis.page import Study
from longred_megatron.analysis.plots import grids, lines
from longred_megatron.errors import UserError
from longred_megatron.page import Plot

KIND = "longred-megatron study of positional vectors"
REACH = 8  # points on each side of the border that are compared


@dataclass(frozen=True)
class Positions:
    """Runs of neighbouring positions, each one point. edges: [points + 1]. border: the first point past the window."""

    edges: Tensor
    border: int

    @classmethod
    def of(cls, length: int, window: int, points: int) -> "Positions":
        """About `points` runs of `length` positions, one of which begins at `window`."""
        inside = max(1, round(min(points, length) * window / length))
        outside = max(1, min(points, length) - inside)
        edges = [window * i // inside for i in range(inside)]
        edges += [window + (length - window) * i // outside for i in range(outside + 1)]
        edges = sorted(set(edges))
        return cls(torch.tensor(edges), edges.index(window))


@dataclass(frozen=True)
class Vectors:
    """Of one layer. similarity: cosines [points, points] of the positional vectors.

    continuity: mean cosine of the points next to each other across the border, the i-th before it with the i-th behind
    it, minus the same around the middle of the window: 0, as smooth as inside; below, a break.
    """

    similarity: Tensor
    border: int

    @property
    def inside(self) -> float:
        return _without_diagonal(self.similarity[: self.border, : self.border])

    @property
    def outside(self) -> float:
        return _without_diagonal(self.similarity[self.border :, self.border :])

    @property
    def across(self) -> float:
        """Mean cosine of the points inside with those outside."""
        return self.similarity[: self.border, self.border :].mean().item()

    @property
    def continuity(self) -> float:
        size = min(REACH, self.border // 2, len(self.similarity) - self.border)
        return self._neighbours(self.border, size) - self._neighbours(self.border // 2, size)

    def _neighbours(self, border: int, size: int) -> float:
        return sum(self.similarity[border - 1 - i, border + i].item() for i in range(size)) / size

    def to_json(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in ("inside", "outside", "across", "continuity")}


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `tools/analyze.py positional-vectors`."""
    add_common(
        parser, "Hugging Face folders; the first has the original window", "tokens of a text (default: two windows)", 16
    )
    parser.add_argument("--window", type=int, metavar="N", help="original window (default: the first model's)")
    parser.add_argument("--points", type=int, default=256, metavar="N", help="runs of positions (%(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="*", default=[], metavar="K", help="shown layers (first, middle, last)"
    )


def study(options: Namespace, ranks: Ranks) -> Study:
    """Measures each model in its turn.

    Raises:
        UserError: no model, a layer that is not there, texts that do not reach past the window, or are too short.
    """
    models = models_of(options, KIND, ranks)
    window = models[0].architecture.max_position_embeddings if options.window is None else options.window
    length = 2 * window if options.length is None else options.length
    check_number("points", options.points, 8)
    check_number("window", window, 4)
    if length < window + 2:
        raise UserError(f"--length {length}: the texts must reach past the window of {window}; use {2 * window}")
    shown = check_layers(options.layers, models[0])
    for model in models[1:]:
        check_layers(shown, model)
    positions = Positions.of(length, window, options.points)
    tokens = texts_of(options, models[0], length)
    found: dict[str, list[Vectors]] = {}
    with ranks.bar(sum(model.architecture.num_layers for model in models), tokens) as bar:
        for model in models:
            own = tokens if model is models[0] else texts_of(options, model, length)
            with model.opened() as network:
                every = positional_vectors(Subject(network), own, positions.edges, ranks, bar)
            found[model.name] = [Vectors(_cosines(vectors), positions.border) for vectors in every]
    return _study(models, found, positions, window, shown, tokens)


@torch.inference_mode()
def positional_vectors(subject: Subject, tokens: Tensor, edges: Tensor, ranks: Ranks, bar: Any) -> list[Tensor]:
    """Of each layer, [points, hidden]: mean hidden state of the positions edges[i] ... edges[i + 1] - 1 over texts,
    minus the mean over all positions. tokens: [texts, length]."""
    architecture, sizes = subject.network.architecture, edges.diff()
    sums = torch.zeros(architecture.num_layers, len(sizes), architecture.hidden_size, dtype=torch.float64)
    points = torch.arange(len(sizes)).repeat_interleave(sizes)
    for values in subject.walk(ranks.part(tokens)):
        sums[values.layer - 1].index_add_(0, points[values.tokens], values.hidden.cpu().double())
        if values.tokens.stop == tokens.shape[1]:
            bar.update()
    means = ranks.total(sums) / (len(tokens) * sizes[:, None])
    weights = sizes / sizes.sum()
    return [mean - weights @ mean for mean in (each.float() for each in means)]


def _cosines(vectors: Tensor) -> Tensor:
    unit = F.normalize(vectors, dim=-1)
    return unit @ unit.T


def _without_diagonal(values: Tensor) -> float:
    count = len(values)
    return ((values.sum() - values.trace()) / max(1, count * (count - 1))).item()


def _study(
    models: list[Model], found: dict[str, list[Vectors]], positions: Positions, window: int, shown: list[int],
    tokens: Tensor,
) -> Study:  # fmt: skip
    rows = [["model", "layer", "inside", "outside", "across", "continuity"]]
    for name, layers in found.items():
        for k, vectors in enumerate(layers, start=1):
            rows.append([name, str(k), *(f"{value:+.3f}" for value in vectors.to_json().values())])
    length = tokens.shape[1]
    return Study(
        KIND,
        f"Positional vectors: {', '.join(found)}",
        [
            f"Mean hidden state by position over {len(tokens)} texts of {length:,} tokens, minus the mean over "
            f"positions; cosines of them inside and outside of the window of {window:,}, and across its border.",
            "Continuity: cosine of neighbours across the border, minus that in the middle of the window. 0: no break.",
        ],
        rows,
        _figures(found, positions, window, shown),
        {
            "window": window,
            "length": length,
            "edges": positions.edges.tolist(),
            "models": [
                model.to_json()
                | {
                    "layers": {str(k): each.to_json() for k, each in enumerate(found[model.name], start=1)},
                    "similarity": {str(k): _rounded(found[model.name][k - 1].similarity) for k in shown},
                }
                for model in models
            ],
        },
        tokens,
    )


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _figures(found: dict[str, list[Vectors]], positions: Positions, window: int, shown: list[int]) -> list[Plot]:
    layers = {name: list(range(1, len(vectors) + 1)) for name, vectors in found.items()}
    figures = [
        lines(
            {
                "continuity at the border": {n: (layers[n], [v.continuity for v in vs]) for n, vs in found.items()},
                "similarity across the border": {n: (layers[n], [v.across for v in vs]) for n, vs in found.items()},
            },
            "continuity",
            "layer",
            "Far below 0 the layer's sense of position breaks at the border of the original window: train longer, or "
            "with a shorter T_s of restoration (LongReD found a long one to break it).",
        )
    ]
    for number, (name, vectors) in enumerate(found.items()):
        panels = {f"{name[:20]}, layer {k}": vectors[k - 1].similarity for k in shown[:3]}
        caption = (
            f"Cosine of the positional vectors of two positions; the window ends at {window:,}. A smooth band along "
            "the diagonal is good; a square corner at the border is a position outside that looks like none inside."
        )
        edges = positions.edges.tolist()
        figures.append(grids(panels, f"grid{number}", ("position", "position"), caption, edges, signed=True))
    return figures
