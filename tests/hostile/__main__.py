"""Tries every command on hostile input, and prints a table by class.

make hostile
python -m tests.hostile --only data --jobs 1
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.hostile import runner
from tests.hostile.classes import CLASSES, cases_of
from tests.hostile.judge import Outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="CLASS")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--list", action="store_true", help="prints the cases, runs none")
    parser.add_argument("--quick", action="store_true", help="a part of each class, as in CI")
    parser.add_argument("--verbose", action="store_true", help="all that a case which is NOT ok has printed")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side (default: %(default)s)")
    options = parser.parse_args()
    chosen = {
        (name, case.name): case
        for name in options.only
        for case in cases_of(name, options.quick)
        if options.case in case.name
    }
    if options.list:
        print("\n".join(f"{name:16}  {case}" for name, case in chosen), f"\n{len(chosen)} cases")
        return
    started, failed, done = time.monotonic(), 0, 0
    class_of = {id(case): name for (name, _), case in chosen.items()}
    runner.warm()
    folder = Path(tempfile.mkdtemp(prefix="hostile-")).resolve()  # no TemporaryDirectory: children would remove it
    try:
        print(flush=True)
        for outcome in runner.run_cases(chosen.values(), folder, options.jobs):
            done += 1
            failed += not outcome.ok
            print(row(class_of[id(outcome.case)], outcome), flush=True)
            if options.verbose and not outcome.ok:
                print(outcome.stdout, outcome.stderr, sep="\n")
    finally:
        runner.remove(folder)
    print(f"\n{done} cases, {done - failed} ok, {failed} NOT ok, {time.monotonic() - started:.0f} seconds")
    sys.exit(1 if failed else 0)


def row(name: str, outcome: Outcome) -> str:
    """Class, case, exit code, seconds, ok or NOT, first line of the message, leftovers; and what is wrong."""
    verdict = "ok " if outcome.ok else "NOT"
    left = f"left {len(outcome.leftovers)}" if outcome.leftovers else ""
    line = f"{name:15} {outcome.case.name:58} {outcome.code:4} {outcome.seconds:5.1f}s {verdict} {left:7}"
    line += f" {outcome.first_line[:150]}"
    return line + "".join(f"\n{'':17}! {complaint[:300]}" for complaint in outcome.complaints)


if __name__ == "__main__":
    main()
