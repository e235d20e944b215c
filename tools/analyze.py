#!/usr/bin/env python
"""Studies one model: prints a table, writes results.json and a page beside it."""

import argparse
import sys
from importlib import import_module

from longred_megatron.errors import report_beside, run_cli

EXAMPLES = """examples:
  # what FP8's casts do to a model, before a GPU is at hand
  python tools/analyze.py fp8 --hf models/base --output runs/fp8 --text texts/books --lengths 512 4096 32768

The output folder gets report.html and results.json. It must be new, empty, or hold an earlier study of the kind."""
STUDIES = {"fp8": "loss and hidden states with emulated FP8 against bf16, by length of the text"}
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
            import_module(f"longred_megatron.analysis.{name}").add_arguments(command)
    options = parser.parse_args(arguments)
    report_beside(options.output)
    study = import_module(f"longred_megatron.analysis.{options.study}").study(options)
    print(study.text(), flush=True)
    study.write(options.output)
    print(f"\nwritten: {options.output / 'report.html'}, {options.output / 'results.json'}")


if __name__ == "__main__":
    run_cli(main)
