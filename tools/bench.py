#!/usr/bin/env python
"""Speed and memory of this project beside plain ways to do the same work, on this machine.

Both sides do the same work in processes of their own, by turns, several times; that they compute the same is checked.
Models have random weights: nothing is downloaded.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.errors import report_beside, run_cli

EXAMPLES = """examples:
  # what there is
  python tools/bench.py --list

  # everything at tiny sizes, to see that it runs; the ratios say nothing
  python tools/bench.py --quick

  # LongReD's step against the published algorithm, half as many micro-batches in the same mix
  python tools/bench.py longred_step microbatches=[4,1,3] --output build/bench

  # the kernels at another length
  python tools/bench.py kernels sequence_length=8192 --repeats 9

On a machine that does something else the times are noise. LONGRED_DEVICE=cpu compares on the CPU where there is a GPU,
OMP_NUM_THREADS sets the threads of both sides.
The output folder gets results.json, table.md and report.html, after each case what has been measured so far.
exit code: 0, 1 if a side failed or the two did not compute the same, 2 for a mistake in the command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError for a name or a size that is not known, and for an output that is taken."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="comparisons; none: all of them")
    parser.add_argument(
        "sizes", nargs="*", metavar="KEY=VALUE", help="changes of the sizes that --list shows, such as layers=12"
    )
    parser.add_argument("--list", action="store_true", help="print the comparisons and the sizes, and run none")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and one repeat unless --repeats says more")
    parser.add_argument("--repeats", type=int, metavar="N", help="of each side, after one that is not counted (5)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the results; one of earlier ones will do"
    )
    options = parser.parse_intermixed_args(words)
    given = [*options.names, *options.sizes]
    from longred_megatron.bench.base import QUICK, Sizes  # takes seconds
    from longred_megatron.bench.report import KIND
    from longred_megatron.bench.results import markdown
    from longred_megatron.bench.run import Bench, changed_sizes, chosen
    from longred_megatron.evaluation.report import check_output

    wanted = chosen([word for word in given if "=" not in word])
    sizes = changed_sizes(QUICK if options.quick else Sizes(), [word for word in given if "=" in word])
    if options.list:
        for name, comparison in wanted.items():
            print(f"{name:20} {comparison.__doc__}")
        for key, value in sizes.model_dump(mode="json").items():
            print(f"{key}={value}".replace(" ", ""))
        return
    repeats = options.repeats if options.repeats is not None else 1 if options.quick else 5
    bench = Bench(sizes, repeats, lambda line: print(line, flush=True))
    if options.output is not None:
        report_beside(options.output)
        check_output(options.output, KIND)
    bench.run(wanted, options.output, f"python tools/bench.py {shlex.join(words)}")
    print(f"\n{markdown(bench.results)}")
    if any(result.problem for result in bench.results):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
