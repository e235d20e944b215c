#!/usr/bin/env python
"""Runs a study: recipes with changes and seeds, one after another; then measures and compares all models."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.device import force_cpu
from longred_megatron.errors import UserError, report_beside, run_cli

EXAMPLES = """examples:
  # what would be run, and what is there already
  python tools/study.py recipes/studies/tiny_longred.yaml --list

  # everything; what is there is not made again
  python tools/study.py recipes/studies/tiny_longred.yaml

  # some of it, with one seed, into another folder
  python tools/study.py recipes/studies/tiny_longred.yaml --only long_cpt longred_c --seeds 1 --output runs/look

  # on 8 GPUs
  python tools/study.py recipes/studies/llama3_8b_32k_ablations.yaml --launch "torchrun --nproc-per-node 8"

A study file names recipes, changes to each as on the command line, seeds, texts, and claims such as "A reads short
texts better than B". Its folder gets runs/, and report/ with report.html, table.md and results.json. A run that was
stopped goes on. Without --launch everything runs on the CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError for a study file or a recipe that is not sound, and for a run that fails."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="the study file")
    parser.add_argument("--list", action="store_true", help="print the runs, and make none")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these runs and rows of the table, and what they need"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="instead of the study's")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder instead of the study's")
    parser.add_argument("--launch", metavar="WORDS", help='what starts a run, such as "torchrun --nproc-per-node 8"')
    options = parser.parse_args(words)
    launch = None
    if options.launch is None:
        force_cpu()
    else:
        try:
            launch = shlex.split(options.launch)
        except ValueError as error:
            raise UserError(f"--launch {options.launch}: {error}; quote words as in a shell") from None
        if not launch:
            raise UserError('--launch is empty: give the words before `-m`, such as "torchrun --nproc-per-node 8"')
    from longred_megatron.evaluation.report import check_output  # takes seconds
    from longred_megatron.page import PAGE
    from longred_megatron.study.members import make, members
    from longred_megatron.study.report import KIND
    from longred_megatron.study.run import check_inputs, chosen, measure_and_report
    from longred_megatron.study.settings import load_study

    study = load_study(options.study, tuple(options.seeds) if options.seeds else None)
    if options.output is not None:
        study = study.model_copy(update={"dir": options.output.absolute()})
    wanted = chosen(study, members(study), options.only)
    if options.list:
        for member in wanted:
            print(
                f"{'is there' if member.exists() else 'to make':9} {member.row}, seed {member.seed}: {member.command()}"
            )
        return
    report_beside(study.dir)
    check_output(study.report_dir, KIND)
    check_inputs(study)
    make(wanted, launch)
    print(measure_and_report(study, wanted, f"python tools/study.py {shlex.join(words)}"))
    print(f"The page: {study.report_dir / PAGE}")


if __name__ == "__main__":
    run_cli(main)
