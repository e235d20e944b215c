"""The plan as one page: memory of each stage's ranks by part, the step in time, and the layouts that fit."""

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from longred_megatron.page import INK, MARKERS, MODEL_COLOURS, REFERENCE_COLOUR, STYLE, Plot, html, svg_of
from longred_megatron.planning.plan import AXES, GIB, Change, PhasePlan, verdict
from longred_megatron.planning.search import Outcome

AT_THE_END = ("data-parallel messages", "optimizer")
MEMORY = (
    "The fullest moment of the ranks of each pipeline stage; the dotted line is the GPU's memory. What passes it does "
    "not fit: recompute more, use more tensor, context or pipeline ranks, or a smaller micro-batch."
)
STEP = (
    "One step, pipeline stage by stage: full colour forward, light colour backward, grey the teachers' pass before and "
    "the gradients' messages and the optimizer after. White is waiting: more micro-batches a replica or virtual stages "
    "fill it."
)
LAYOUTS = (
    "Every layout that fits, by the hours of the run and the memory of its fullest rank: the lower left is best; the "
    "colour is what is recomputed, the shape the number of tensor ranks. Rings are the fastest with FP8, which changes "
    "what is computed."
)


def page(plans: Sequence[PhasePlan], changes: Sequence[Change] = (), outcome: Outcome | None = None) -> str:
    """The page of what plan.json holds. outcome: of the search that found the layout."""
    plan = max(plans, key=lambda each: each.needed_bytes)
    figures = [Plot(_memory(plan), MEMORY), Plot(_step(plan), STEP)]
    if outcome is not None:
        figures.append(Plot(_layouts(outcome), LAYOUTS))
    notes = [*verdict(plans, changes), "Nothing of this is measured; docs/planning.md says how far it can be trusted."]
    return html("Plan of a run", notes, figures, list(_tables(plan)))


def _tables(plan: PhasePlan) -> Iterator[list[list[str]]]:
    yield [
        ["GiB of a rank", *(f"stage {each.stage}" for each in plan.memory)],
        *([name, *(f"{part / GIB:.2f}" for part in parts)] for name, parts in _parts(plan).items()),
    ]
    seconds = sorted(plan.seconds_by_part.items(), key=lambda item: -item[1])
    yield [
        ["seconds of a step", "", ""],
        *([name, f"{each:.3f}", f"{each / plan.step_seconds:.0%}"] for name, each in seconds),
    ]
    sent = plan.communication_bytes
    yield [["GB sent by a rank in a step", ""], *([axis, f"{sent[axis] / 1e9:.2f}"] for axis in AXES if sent[axis])]
    assumptions = plan.gpu.model_dump(mode="json").items()
    yield [["assumed of the GPU", ""], *([key.replace("_", " "), _shown(value)] for key, value in assumptions)]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def _parts(plan: PhasePlan) -> dict[str, list[float]]:
    """Bytes of each stage's ranks, by part; those that are nowhere left out."""
    names = dict.fromkeys(name for each in plan.memory for name in each.peak.parts)
    parts = {name: [each.peak.parts.get(name, 0.0) for each in plan.memory] for name in names}
    return {name: each for name, each in parts.items() if any(each)} | {
        "reserved": [plan.gpu.reserved_bytes] * len(plan.memory)
    }


def _memory(plan: PhasePlan) -> str:
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        stages = [f"stage {each.stage}" for each in plan.memory]
        figure = Figure(figsize=(10.4, 1.6 + 0.32 * len(stages)), layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(stages)
        for number, (name, parts) in enumerate(_parts(plan).items()):
            colour = REFERENCE_COLOUR if name == "reserved" else MODEL_COLOURS[number % len(MODEL_COLOURS)]
            sizes = [part / GIB for part in parts]
            axes.barh(stages, sizes, left=left, height=0.7, color=colour, label=name)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axes.axvline(plan.gpu.memory_bytes / GIB, color=INK, linestyle=":")
        axes.set_title("Memory of a rank (GiB)")
        axes.invert_yaxis()
        figure.legend(loc="outside lower left", ncols=5, frameon=False)
        return svg_of(figure, "memory")


def _step(plan: PhasePlan) -> str:
    objectives = list(dict.fromkeys(plan.order))
    colours = {name: MODEL_COLOURS[number % len(MODEL_COLOURS)] for number, name in enumerate(objectives)}
    after = sum(plan.seconds_by_part.get(part, 0.0) for part in AT_THE_END)
    passes = max(stage[-1].end for stage in plan.timeline)
    before = plan.step_seconds - passes - after
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(10.4, 1.8 + 0.32 * len(plan.timeline)), layout="constrained")
        axes = figure.subplots()
        for number, stage in enumerate(plan.timeline):
            rows = (number - 0.4, 0.8)
            for name in objectives:
                for backward in (False, True):
                    mine = [t for t in stage if plan.order[t.what.microbatch] == name and t.what.backward == backward]
                    spans = [(before + t.start, t.end - t.start) for t in mine]
                    axes.broken_barh(spans, rows, facecolor=colours[name], alpha=0.5 if backward else 1.0, linewidth=0)
            ends = [(0.0, before), (before + passes, after)]
            axes.broken_barh([span for span in ends if span[1] > 0], rows, facecolor=REFERENCE_COLOUR, linewidth=0)
        axes.set_yticks(range(len(plan.timeline)), [f"stage {number}" for number in range(len(plan.timeline))])
        axes.set_xlim(0, plan.step_seconds)
        axes.set_title(f"One step, {plan.step_seconds:.2f} s")
        axes.set_xlabel("seconds")
        axes.invert_yaxis()
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False)
        return svg_of(figure, "step")


def _layouts(outcome: Outcome) -> str:
    found = outcome.fitting
    shapes = [each.plans[0].phase.recipe for each in found]
    tensors = sorted({recipe.parallel.tensor for recipe in shapes})
    markers = {tensor: MARKERS[number % len(MARKERS)] for number, tensor in enumerate(tensors)}
    recomputes = sorted({recipe.training.recompute for recipe in shapes})
    colours = dict(zip(recomputes, MODEL_COLOURS, strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        axes = figure.subplots()
        for tensor, marker in markers.items():
            for recompute, colour in colours.items():
                mine = [
                    each
                    for each, recipe in zip(found, shapes, strict=True)
                    if (recipe.parallel.tensor, recipe.training.recompute) == (tensor, recompute)
                ]
                hours, sizes = [each.hours for each in mine], [each.needed_bytes / GIB for each in mine]
                axes.scatter(hours, sizes, s=36, marker=marker, color=colour, linewidths=0)
        for each in outcome.with_fp8:
            axes.scatter(each.hours, each.needed_bytes / GIB, s=90, facecolors="none", edgecolors=INK)
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("hours of the run")
        axes.set_ylabel("GiB of the fullest rank")
        axes.set_title(f"{len(found)} layouts that fit on {outcome.world_size} GPUs")
        kinds = [Patch(color=colour, label=f"recompute {name}") for name, colour in colours.items()]
        shown = [
            Line2D([], [], linestyle="", marker=marker, color=INK, label=f"tensor {n}") for n, marker in markers.items()
        ]
        if outcome.with_fp8:
            shown.append(Line2D([], [], linestyle="", marker="o", color=INK, markerfacecolor="none", label="with FP8"))
        figure.legend(handles=[*kinds, *shown], loc="outside lower left", ncols=5, frameon=False)
        return svg_of(figure, "layouts")
