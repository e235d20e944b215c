"""results.json, table.md and report.html of a run of comparisons."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import longred_megatron
from longred_megatron.bench.base import Sizes
from longred_megatron.bench.results import HEAD, Result, markdown
from longred_megatron.device import on_gpu
from longred_megatron.files import write_text
from longred_megatron.page import INK, MODEL_COLOURS, PAGE, RESULTS, STYLE, Plot, html, svg_of

KIND = "longred_megatron.bench"
TABLE = "table.md"
CAPTION = (
    "Dots are medians over pairs of repeats, lines go from the least to the most. Left: our speed in parts of the "
    "reference's (right of 1 is faster). Right: our peak memory in parts of its (left of 1 is less)."
)


def write_report(
    folder: Path, results: Sequence[Result], peaks: Mapping[str, float], sizes: Sizes, command: str
) -> None:
    """Everything that has been measured so far."""
    about = machine()
    held = {
        "kind": KIND,
        "command": command,
        "machine": about,
        "sizes": sizes.model_dump(mode="json"),
        "peak_flops": dict(peaks),
        "results": [result.as_json() for result in results],
    }
    write_text(folder / RESULTS, json.dumps(held, indent=1) + "\n")
    write_text(folder / TABLE, markdown(results))
    shown = [result for result in results if not result.problem]
    figures = [Plot(_figure(shown), CAPTION)] if shown else []
    notes = [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "Peak of matrix products: "
        + (", ".join(f"{dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in peaks.items()) or "not measured"),
        f"Made by: {command}",
    ]
    write_text(folder / PAGE, html("Speed and memory", notes, figures, [[HEAD, *(result.row() for result in results)]]))


def machine() -> dict[str, Any]:
    """Where this runs, and with which versions. load: processes that wanted a core in the last minute."""
    return {
        "device": torch.cuda.get_device_name() if on_gpu() else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "longred_megatron": longred_megatron.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _figure(results: Sequence[Result]) -> str:
    names = [f"{result.comparison}: {result.setting}" for result in results]
    places = range(len(results))
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(10.4, 1.4 + 0.3 * len(results)), layout="constrained")
        speed, memory = figure.subplots(1, 2, sharey=True)
        for y, result in zip(places, results, strict=True):
            ratios = result.ratios
            speed.plot([min(ratios), max(ratios)], [y, y], color=MODEL_COLOURS[0])
            speed.plot(statistics.median(ratios), y, "o", color=MODEL_COLOURS[0])
            if result.memory_ratio is not None:
                memory.plot(result.memory_ratio, y, "o", color=MODEL_COLOURS[1])
        for axes, title in ((speed, "speed, ours / reference"), (memory, "peak memory, ours / reference")):
            axes.set_title(title)
            axes.set_xscale("log")
            axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else ""))
        speed.set_yticks(places, names)
        speed.invert_yaxis()
        return svg_of(figure, "bench")
