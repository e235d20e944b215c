#!/usr/bin/env python
"""Evaluates several models side by side: prints one table, writes one page and one JSON file."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longred_megatron.errors import report_beside, run_cli

if TYPE_CHECKING:
    from longred_megatron.evaluation.settings import Settings

EXAMPLES = """examples:
  # the original model first, then what was made of it
  python tools/evaluate.py --hf models/base runs/a/hf runs/b/hf --output report

  # own texts: short ones for what should be kept, long ones for what should be gained
  python tools/evaluate.py --hf models/base runs/a/hf --output report \\
      --short-text texts/short.jsonl --long-text texts/books

  # a quick look at a long window on one GPU
  python tools/evaluate.py --hf models/base runs/a/hf --output report --window 131072 --prompt-sets 1 --long-windows 4

  # RULER's tasks, of which those of question answering need questions
  python tools/evaluate.py --hf models/base runs/a/hf --output report --long-text texts/books \\
      --tasks ruler --questions squad.jsonl --lengths 4096 8192 16384 32768 --prompt-sets 2 --samples 2

  # the same of an instruction-tuned model, in its chat template
  python tools/evaluate.py --hf models/instruct runs/a/hf --output report --long-text texts/books \\
      --tasks ruler nonliteral --chat-template

  # every checkpoint of a run beside the model it started from
  python tools/evaluate.py --hf models/base --runs runs/a --output report

  # the prompts alone, to ask them of a model in another runtime
  python tools/evaluate.py --hf models/base --window 131072 --write-prompts prompts.jsonl

  # short-text skills by published benchmarks, whose data sets are on disk already
  python tools/evaluate.py --hf models/base runs/a/hf --output report --benchmarks mmlu piqa lambada

Texts are .txt files (one document each), .jsonl files (one a line), .parquet files (one a row), or folders of
them; with none, the Python standard library's sources of this machine. The output folder gets report.html and
results.json. It must be new, empty, or hold an earlier report."""


def parse(arguments: list[str]) -> argparse.Namespace:
    from longred_megatron.dtypes import TORCH_DTYPES  # here and below: what takes seconds to import, see `run_cli`
    from longred_megatron.evaluation.settings import Settings

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    paths: dict[str, Any] = {"type": Path, "metavar": "PATH", "nargs": "+"}
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add = parser.add_argument_group("models and output").add_argument
    add("--hf", nargs="+", required=True, **folder, help="Hugging Face folders; the first is the reference")
    add("--runs", nargs="+", default=[], **folder, help="run folders: each of their checkpoints is one more model")
    add("--reference", **folder, help="the model the others started from, instead of the first --hf")
    add("--name", nargs="+", default=[], metavar="NAME", help="a name for each --hf (default: from its path)")
    place = parser.add_mutually_exclusive_group(required=True).add_argument
    place("--output", **folder, help="folder for the report")
    place(
        "--write-prompts", type=Path, metavar="FILE",
        help="measure nothing, and write all prompts as JSON lines with tokens, text and right answer",
    )  # fmt: skip
    add = parser.add_argument_group("texts and windows").add_argument
    add("--text", default=[], **paths, help="texts for all measurements")
    add("--short-text", **paths, help="texts for the original window, instead of --text")
    add("--long-text", **paths, help="texts for the extended window and as filler of prompts")
    add(
        "--text-key", default=default.text_key, metavar="KEY",
        help="the text's key in .jsonl lines and its column in .parquet files (%(default)s)",
    )  # fmt: skip
    add("--window", **number, help="extended window in tokens (default: the largest of the models)")
    add("--original-window", **number, help="original window in tokens (default: the reference's)")
    add("--short-windows", default=default.num_short_windows, **number, help="windows of short text (%(default)s)")
    add("--long-windows", default=default.num_long_windows, **number, help="windows of long text (%(default)s)")
    _add_tasks(parser, default)
    add = parser.add_argument_group("running").add_argument
    devices, dtypes = ("auto", "cpu", "cuda"), ("auto", *TORCH_DTYPES)
    add("--device", choices=devices, default=default.device, help="default: CUDA where there is a GPU")
    add("--dtype", choices=dtypes, default=default.dtype, help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--tokens-per-batch", **number, help="default: 16384 on CUDA, 2048 on a CPU (its caches are small)")
    add("--seed", default=default.seed, **number, help="order of texts and prompts (%(default)s)")
    return parser.parse_args(arguments)


def _add_tasks(parser: argparse.ArgumentParser, default: "Settings") -> None:
    """The flags of tasks and benchmarks."""
    from longred_megatron.evaluation.benchmarks.harness import ALLOW_CODE
    from longred_megatron.evaluation.benchmarks.published import PUBLISHED
    from longred_megatron.evaluation.tasks import GROUPS, TASKS

    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add = parser.add_argument_group("tasks").add_argument
    add(
        "--tasks", nargs="+", default=default.tasks, metavar="NAME",
        help=f"of {', '.join(TASKS)}; {', '.join(GROUPS)}: all of that group (default: {' '.join(default.tasks)})",
    )  # fmt: skip
    add(
        "--lengths", nargs="+", default=[], **number,
        help="prompt lengths in tokens, answer included (default: a quarter of the original window, doubled up to "
        "the extended one)",
    )  # fmt: skip
    add("--depths", default=default.num_depths, **number, help="places of what is asked for (%(default)s)")
    add("--prompt-sets", default=default.num_prompt_sets, **number, help="independent sets of prompts (%(default)s)")
    add("--samples", default=default.num_samples, **number, help="prompts a set, length and depth (%(default)s)")
    add("--keys", default=default.num_keys, **number, help="keys in a multi-key prompt (%(default)s)")
    add(
        "--questions", type=Path, metavar="FILE",
        help='for qa_1 and qa_2: .jsonl, {"question": ..., "answers": [...], "context": ...} a line, or "documents": '
        "[...] for a question that needs several",
    )  # fmt: skip
    add(
        "--chat-template", action="store_true",
        help="ask the tasks of ruler and nonliteral as a chat message, in the first model's template: for "
        "instruction-tuned models",
    )  # fmt: skip
    title = "published benchmarks, by lm-evaluation-harness (extra `eval`), offline"
    add = parser.add_argument_group(title).add_argument
    add(
        "--benchmarks", nargs="+", default=[], metavar="NAME",
        help=f"of {', '.join(PUBLISHED)}, and tasks of --benchmark-tasks (default: none). humaneval runs code that the "
        f"model writes, only with {ALLOW_CODE}=1",
    )  # fmt: skip
    add("--benchmark-tasks", type=Path, metavar="DIR", help="your own task files (YAML) for the harness")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    from longred_megatron.evaluation.evaluate import evaluate, write_prompt_file
    from longred_megatron.evaluation.report import format_table
    from longred_megatron.evaluation.settings import Settings
    from longred_megatron.page import PAGE, RESULTS

    settings = Settings(
        short_texts=tuple(options.text if options.short_text is None else options.short_text),
        long_texts=tuple(options.text if options.long_text is None else options.long_text),
        text_key=options.text_key,
        original_window=options.original_window,
        extended_window=options.window,
        num_short_windows=options.short_windows,
        num_long_windows=options.long_windows,
        lengths=tuple(sorted(set(options.lengths))),
        tasks=tuple(options.tasks),
        num_depths=options.depths,
        num_prompt_sets=options.prompt_sets,
        num_samples=options.samples,
        num_keys=options.keys,
        questions=options.questions,
        chat_template=options.chat_template,
        benchmarks=tuple(options.benchmarks),
        benchmark_tasks=options.benchmark_tasks,
        tokens_per_batch=options.tokens_per_batch,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )
    if options.write_prompts:
        number = write_prompt_file(
            options.hf, options.write_prompts, settings=settings, reference=options.reference, runs=options.runs
        )
        print(f"written: {number:,} prompts to {options.write_prompts}")
        return
    report_beside(options.output)
    evaluate(
        options.hf,
        options.output,
        settings=settings,
        reference=options.reference,
        names=options.name,
        runs=options.runs,
        command=shlex.join(["python", "tools/evaluate.py", *arguments]),
        show=lambda report: print(format_table(report), flush=True),
    )
    print(f"\nwritten: {options.output / PAGE}, {options.output / RESULTS}")


if __name__ == "__main__":
    run_cli(main)
