"""Attention drift, hidden-state similarity and loss of models and checkpoints: the first table of LongReD."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longred_megatron.analysis.inputs import Model, check_comparable, check_number, models_of, texts_of
from longred_megatron.analysis.inputs import add_arguments as add_common
from longred_megatron.analysis.measure import Drift, Ranks, Subject, measure_drift
from longred_megatron.analysis.page import Study
from longred_megatron.analysis.plots import grids, lines
from longred_megatron.errors import UserError
from longred_megatron.page import Plot

KIND = "longred-megatron study of drift"


@dataclass(frozen=True)
class Result:
    """One model against the original at one length, in tokens. score_kept: its score / the original's."""

    model: Model
    length: int
    drift: Drift
    score_kept: float | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `tools/analyze.py drift`."""
    add_common(
        parser,
        "Hugging Face folders, the first is the original",
        "tokens of a text, the long ones (default: the original's window, at most 8,192)",
        16,
    )
    parser.add_argument(
        "--short", type=int, metavar="N", help="measure also at this length, on the texts' first tokens"
    )
    parser.add_argument(
        "--scores", nargs="+", type=float, default=[], metavar="X",
        help="a score of each model (MMLU, ...), in the order of the table, the original's first",
    )  # fmt: skip


def study(options: Namespace, ranks: Ranks) -> Study:
    """Measures each model in its turn.

    Raises:
        UserError: models that cannot be compared, a run without checkpoints, texts too short, or wrong scores.
    """
    models = models_of(options, KIND, ranks)
    original, *others = models
    check_comparable(models)
    if not others:
        raise UserError("nothing to compare with the original; give more folders at --hf, or a run at --runs")
    if options.scores and (len(options.scores) != len(models) or options.scores[0] <= 0):
        raise UserError(
            f"--scores has {len(options.scores)} numbers: give one for each of the {len(models)} models, > 0"
        )
    window = original.architecture.max_position_embeddings
    length = min(window, 8192) if options.length is None else options.length
    tokens = texts_of(options, original, length)
    lengths = [length]
    if options.short is not None:
        check_number("short", options.short, 2)
        if options.short >= length:
            raise UserError(f"--short {options.short}: must be less than the long texts' {length} tokens")
        lengths = [options.short, length]
    results = []
    layers = original.architecture.num_layers * len(others) * len(lengths)
    with original.opened() as network, ranks.bar(layers, tokens) as bar:
        for i, model in enumerate(others, start=1):
            kept = options.scores[i] / options.scores[0] if options.scores else None
            with model.opened() as other:
                for each in lengths:
                    [drift] = measure_drift(tokens[:, :each], Subject(network), [Subject(other)], ranks, bar)
                    results.append(Result(model, each, drift, kept))
    return Study(
        KIND,
        f"Drift from {original.name}",
        [
            f"Against {original.path}: KL(original || model) of attention in nats, mean over layers, heads, positions "
            f"and {len(tokens)} texts; similarity: cosine of the layers' outputs; loss: of the next token, in nats, "
            "and its change from the original's on the same texts. In brackets: 95 % intervals, over texts."
        ],
        _table(results),
        _figures(results),
        {
            "original": original.to_json(),
            "lengths": lengths,
            "models": [_entry(model, results) for model in others],
        },
        tokens,
    )


def _entry(model: Model, results: Sequence[Result]) -> dict[str, Any]:
    own = [each for each in results if each.model is model]
    return model.to_json() | {
        "score_kept": own[0].score_kept,
        "drift": {str(each.length): each.drift.to_json() for each in own},
    }


def _table(results: Sequence[Result]) -> list[list[str]]:
    with_scores = results[0].score_kept is not None
    rows = [["model", "tokens", "attention KL", "similarity", "loss's change", "loss", *with_scores * ["score kept"]]]
    for each in results:
        kept = [] if each.score_kept is None else [f"{each.score_kept:.1%}"]
        rows.append([each.model.name, f"{each.length:,}", *each.drift.shown(), f"{each.drift.loss:.4f}", *kept])
    return rows


def _label(each: Result, results: Sequence[Result]) -> str:
    several = len({one.length for one in results}) > 1
    return f"{each.model.name}, {each.length:,} tokens" if several else each.model.name


def _figures(results: Sequence[Result]) -> list[Plot]:
    layers = list(range(1, len(results[0].drift.layers) + 1))
    by_layer = {
        "attention KL by layer (nats)": {_label(e, results): (layers, e.drift.layers.tolist()) for e in results},
        "similarity by layer": {_label(e, results): (layers, e.drift.similarity.tolist()) for e in results},
    }
    longest = [each for each in results if each.length == results[-1].length]
    figures = [
        lines(
            by_layer,
            "by-layer",
            "layer",
            "Where a model has left the original. Layers that stand out and are not distilled: try them in `layers`.",
        ),
        grids(
            {each.model.name[:28]: each.drift.heads for each in longest[-3:]},
            "heads",
            ("head", "layer"),
            "Attention KL of each head, the last models. Few dark cells: a few heads carry the change. Many: measure a "
            "smaller change of RoPE with tools/select_layers.py.",
        ),
    ]
    steps = sorted((each for each in longest if each.model.step is not None), key=lambda each: each.model.step or 0)
    if len(steps) > 1:
        figures.append(_trend(steps))
    if longest[0].score_kept is not None:
        points = sorted((each.drift.similarity.mean().item(), each.score_kept or 0.0) for each in longest)
        kept = {"score kept": {"models": ([x for x, _ in points], [y for _, y in points])}}
        caption = "Short-text score against similarity. If it rises, similarity is a cheap stand-in for the benchmark."
        figures.append(lines(kept, "scores", "mean similarity to the original", caption, whole_numbers=False))
    return figures


def _trend(steps: Sequence[Result]) -> Plot:
    """By run, for models that are checkpoints."""
    panels: dict[str, Any] = {"attention KL (nats)": {}, "similarity": {}}
    for run in dict.fromkeys(each.model.path.parent for each in steps):
        own = [each for each in steps if each.model.path.parent == run]
        numbers = [each.model.step for each in own]
        panels["attention KL (nats)"][run.parent.name] = (numbers, [e.drift.layers.mean().item() for e in own])
        panels["similarity"][run.parent.name] = (numbers, [e.drift.similarity.mean().item() for e in own])
    caption = "Drift over the run. Where it stops falling, or turns, later steps restore no more: compare scores there."
    return lines(panels, "trend", "step", caption)
