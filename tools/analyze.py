#!/usr/bin/env python
"""Studies models: prints a table, writes results.json, the tokens and a page."""

import argparse
import sys
from importlib import import_module
from types import ModuleType

from longred_megatron.errors import report_beside, run_cli

EXAMPLES = """examples:
  # how far two models and every checkpoint of a run have left the original, on texts of 512 and of 8,192 tokens
  python tools/analyze.py drift --hf models/base runs/a/hf --runs runs/b --length 8192 --short 512 --output runs/drift

  python tools/analyze.py positional-vectors --hf models/base runs/a/hf --length 8192 --output runs/positions
  python tools/analyze.py perturbation --hf models/base runs/a/hf --thetas 1e6 --skips 4096 --output runs/repeats
  python tools/analyze.py query-states --hf models/base runs/a/hf --output runs/queries
  torchrun --nproc-per-node 8 tools/analyze.py query-states --hf models/base runs/a/hf --output runs/queries

  # what FP8's casts do to a model, before a GPU is at hand
  python tools/analyze.py fp8 --hf models/base --output runs/fp8 --text texts/books --lengths 512 4096 32768

The output folder gets report.html, results.json and tokens.safetensors. It must be new, empty, or hold an
earlier study of the kind."""
STUDIES = {
    "drift": "attention drift, similarity and loss of models and checkpoints against the original, by layer and head",
    "positional-vectors": "hidden states' share that depends on the position alone, in and outside of the window",
    "perturbation": "how copies of one sequence in a window differ, by layer and distance",
    "query-states": "what changed in queries, keys, values and their weights, by layer, head and frequency band",
    "fp8": "loss, hidden states and gradients with emulated FP8 against bf16, by length of the text",
}
"""Name -> what it shows; each is a module of longred_megatron/analysis/ with `add_arguments` and `study`."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="study", required=True)
    for name, shows in STUDIES.items():
        command = commands.add_parser(name, help=shows, description=f"Shows {shows}.")
        if name in arguments[:1]:  # the others' modules take seconds to import
            _module(name).add_arguments(command)
    options = parser.parse_args(arguments)
    from longred_megatron.analysis.measure import ranks

    report_beside(options.output)
    with ranks() as team:
        study = _module(options.study).study(options, team)
    if team.is_main:
        print(study.text(), flush=True)
        study.write(options.output)
        print(f"\nwritten: {options.output / 'report.html'}, {options.output / 'results.json'}")


def _module(study: str) -> ModuleType:
    return import_module(f"longred_megatron.analysis.{study.replace('-', '_')}")


if __name__ == "__main__":
    run_cli(main)
