#!/usr/bin/env python
"""Evaluates several models side by side: prints one table, writes one page and one JSON file."""

import argparse
import shlex
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from longred_megatron.dtypes import TORCH_DTYPES
from longred_megatron.errors import run_cli
from longred_megatron.evaluation.evaluate import Settings, evaluate
from longred_megatron.evaluation.report import PAGE, RESULTS, format_table

EXAMPLES = """examples:
  # the original model first, then what was made of it
  python tools/evaluate.py --hf models/base runs/a/hf runs/b/hf --output report

  # own texts: short ones for what should be kept, long ones for what should be gained
  python tools/evaluate.py --hf models/base runs/a/hf --output report \\
      --short-text texts/short.jsonl --long-text texts/books

  # a quick look at a long window on one GPU
  python tools/evaluate.py --hf models/base runs/a/hf --output report --window 131072 --samples 2 --long-windows 4

Texts are .txt files (one document each), .jsonl files (one a line), .parquet files (one a row), or folders of
them; with none, the Python standard library's sources of this machine. The output folder gets report.html and
results.json. It must be new, empty, or hold an earlier report."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()
    models = parser.add_argument_group("models and output")
    models.add_argument(
        "--hf",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face folders; the first is the reference",
    )
    models.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="the model the others started from, instead of the first --hf",
    )
    models.add_argument(
        "--name", nargs="+", default=[], metavar="NAME", help="a name for each --hf (default: from its path)"
    )
    models.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    _add_texts(parser, default)
    _add_retrieval(parser, default)
    _add_running(parser, default)
    return parser.parse_args(arguments)


def _add_texts(parser: argparse.ArgumentParser, default: Settings) -> None:
    texts = parser.add_argument_group("texts and windows")
    texts.add_argument("--text", nargs="+", type=Path, default=[], metavar="PATH", help="texts for all measurements")
    texts.add_argument(
        "--short-text",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="texts for the original window, instead of --text",
    )
    texts.add_argument(
        "--long-text",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="texts for the extended window and as filler of retrieval prompts",
    )
    texts.add_argument(
        "--text-key",
        default=default.text_key,
        metavar="KEY",
        help="the text's key in .jsonl lines and its column in .parquet files (%(default)s)",
    )
    texts.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="extended window in tokens (default: the largest of the models)",
    )
    texts.add_argument(
        "--original-window",
        type=int,
        metavar="N",
        help="original window in tokens (default: the reference's)",
    )
    texts.add_argument(
        "--short-windows",
        type=int,
        default=default.num_short_windows,
        metavar="N",
        help="windows of short text (%(default)s)",
    )
    texts.add_argument(
        "--long-windows",
        type=int,
        default=default.num_long_windows,
        metavar="N",
        help="windows of long text (%(default)s)",
    )


def _add_retrieval(parser: argparse.ArgumentParser, default: Settings) -> None:
    tasks = parser.add_argument_group("retrieval")
    tasks.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="prompt lengths in tokens, answer included (default: a quarter of the original window, doubled "
        "up to the extended one)",
    )
    tasks.add_argument(
        "--depths",
        type=int,
        default=default.num_depths,
        metavar="N",
        help="depths of the key, evenly spaced (%(default)s)",
    )
    tasks.add_argument(
        "--samples",
        type=int,
        default=default.num_samples,
        metavar="N",
        help="prompts for each length and depth (%(default)s)",
    )
    tasks.add_argument(
        "--keys",
        type=int,
        default=default.num_keys,
        metavar="N",
        help="keys in a multi-key prompt (%(default)s)",
    )


def _add_running(parser: argparse.ArgumentParser, default: Settings) -> None:
    running = parser.add_argument_group("running")
    running.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default=default.device,
        help="default: CUDA where there is a GPU",
    )
    running.add_argument(
        "--dtype",
        choices=("auto", *TORCH_DTYPES),
        default=default.dtype,
        help="default: bfloat16 on CUDA, float32 on a CPU",
    )
    running.add_argument(
        "--tokens-per-batch",
        type=int,
        metavar="N",
        help="default: 16384 on CUDA, 2048 on a CPU (its caches are small)",
    )
    running.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="order of texts and prompts (%(default)s)"
    )


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers shows one for each model it loads, terminal or not
    options = parse(arguments)
    settings = Settings(
        short_texts=tuple(options.text if options.short_text is None else options.short_text),
        long_texts=tuple(options.text if options.long_text is None else options.long_text),
        text_key=options.text_key,
        original_window=options.original_window,
        extended_window=options.window,
        num_short_windows=options.short_windows,
        num_long_windows=options.long_windows,
        lengths=tuple(sorted(set(options.lengths))),
        num_depths=options.depths,
        num_samples=options.samples,
        num_keys=options.keys,
        tokens_per_batch=options.tokens_per_batch,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )
    report = evaluate(
        options.hf,
        options.output,
        settings=settings,
        reference=options.reference,
        names=options.name,
        command=shlex.join(["python", "tools/evaluate.py", *arguments]),
    )
    print(format_table(report))
    print(f"\nwritten: {options.output / PAGE}, {options.output / RESULTS}")


if __name__ == "__main__":
    run_cli(main)
