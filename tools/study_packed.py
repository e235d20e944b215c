#!/usr/bin/env python
"""Does retrieval over a long window transfer by logits from packed short texts, and not by cross-entropy?

    make study-packed

A toy of the first claim of arXiv 2604.06070, on a CPU. The demo's base (window 512, RoPE theta 1e4 in its short phase)
trains on stretches of about 270 tokens that fill windows of 2048, by logit distillation from the demo's Long CPT model
and by cross-entropy; with the larger theta of that model in the long phase (phase-wise) and with its own (constant);
each with several seeds of the data's order. Writes report.html, table.md and retrieval.png to runs/study_packed.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longred_megatron.errors import run_cli
from tiny_runs import BASE, RUNS, prepare_texts, train

if TYPE_CHECKING:  # here and below: what takes seconds to import, see `run_cli`
    from longred_megatron.evaluation.report import ModelReport

STUDY = RUNS / "study_packed"
TEACHER = RUNS / "tiny_long_cpt/hf"
LOSSES = {
    "distillation": "recipes/tiny_packed_distillation.yaml",
    "cross-entropy": "recipes/tiny_packed_cross_entropy.yaml",
}
THETAS = {"phase-wise": (), "constant": ("model.rope=none",)}
LENGTHS = (256, 512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the data's order (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of each run (default: %(default)s)")
    arguments = parser.parse_args()
    from longred_megatron.evaluation.evaluate import evaluate
    from longred_megatron.evaluation.report import check_output
    from longred_megatron.evaluation.settings import Settings

    check_output(STUDY)
    started = time.perf_counter()
    texts = prepare_texts()
    train("recipes/tiny_long_cpt.yaml")
    students = {
        (loss, theta): [_trained(loss, theta, seed, arguments.steps) for seed in range(1, arguments.seeds + 1)]
        for loss in LOSSES
        for theta in THETAS
    }
    models = {"base": BASE, "teacher": TEACHER}
    models |= {path.parent.name: path for paths in students.values() for path in paths}
    report = evaluate(
        list(models.values()),
        STUDY,
        settings=Settings(
            short_texts=(texts["held_out_short"],),
            long_texts=(texts["held_out_long"],),
            num_short_windows=32,
            num_long_windows=8,
            lengths=LENGTHS,
            num_prompt_sets=10,
            num_samples=4,
        ),
        names=list(models),
        command="make study-packed",
    )
    base, teacher, *others = report.models
    groups = {"base, not extended": [base], "teacher": [teacher]}
    for place, (loss, theta) in enumerate(students):
        groups[f"{loss}, {theta} theta"] = others[place * arguments.seeds : (place + 1) * arguments.seeds]
    table = markdown(groups)
    (STUDY / "table.md").write_text(table, encoding="utf-8")
    draw(groups, STUDY / "retrieval.png")
    print(table)
    print(f"table, picture and page: {STUDY}")
    print(f"All in {(time.perf_counter() - started) / 60:.1f} minutes.")


def _trained(loss: str, theta: str, seed: int, steps: int) -> Path:
    """The exported model; not made again if it is there."""
    folder = STUDY.with_name(f"{STUDY.name}_runs") / f"{loss}-{theta}-{seed}"
    if not (folder / "hf").exists():
        train(LOSSES[loss], *THETAS[theta], f"training.seed={seed}", f"training.steps={steps}", f"run.dir={folder}")
    return folder / "hf"


def retrieval(model: "ModelReport", length: int) -> float:
    """Share of prompts of `length` tokens answered, mean of one key and of several."""
    return statistics.mean(result.accuracy_at(length) for result in model.retrieval)


def markdown(groups: "dict[str, list[ModelReport]]") -> str:
    """One row a group: mean and, over several seeds, smallest to largest."""

    def cell(values: list[float], scale: float, digits: int, unit: str) -> str:
        low, mean, high = (f"{scale * x:.{digits}f}" for x in (min(values), statistics.mean(values), max(values)))
        return f"{mean}{unit}" + (f" ({low} to {high})" if len(values) > 1 else "")

    titles = ["model", *(f"retrieval @{length:,}" for length in LENGTHS), "short ppl @512", "long ppl @2,048"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, models in groups.items():
        cells = [cell([retrieval(model, length) for model in models], 100, 0, " %") for length in LENGTHS]
        cells += [cell([model.short.perplexity for model in models], 1, 2, "")]
        cells += [cell([model.long.perplexity for model in models], 1, 2, "")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(groups: "dict[str, list[ModelReport]]", path: Path) -> None:
    """Retrieval by length: a line for each group's mean, a dot for each seed."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    colours = dict(zip(groups, ("#888888", "#222222", "#1f7a78", "#7fb8a4", "#c2541b", "#f2b07a"), strict=True))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for name, models in groups.items():
            values = [[retrieval(model, length) for length in LENGTHS] for model in models]
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            style = "--" if len(models) == 1 else "-"
            axes.plot(LENGTHS, means, style, color=colours[name], label=name, linewidth=2)
            if len(models) > 1:
                for row in values:
                    axes.plot(LENGTHS, row, "o", color=colours[name], markersize=4, alpha=0.7)
        axes.axvline(512, color="#bbbbbb", linewidth=1)
        axes.annotate("window of the base", (512, 1.02), color="#666666", ha="center", annotation_clip=False)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(0, 1.01)
        axes.set_xlabel("prompt length, tokens")
        axes.set_ylabel("prompts answered")
        axes.grid(axis="y", color="#e5e5e5")
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_cli(main)
