"""Writes the texts of the demo and of the tiny base model from this machine's Python standard library.

Examples:
    python tools/make_demo_texts.py --output build/texts                        every set
    python tools/make_demo_texts.py --output build/texts --sets long window short
    python tools/make_demo_texts.py --output build/texts --sets repeats --share 0.01
"""

import argparse
from pathlib import Path

from demo_texts import SETS, write_sets
from longred_megatron.errors import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for SET.jsonl, one {'text': ...} a line")
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=list(SETS),
        metavar="SET",
        help=f"of: {', '.join(SETS)}; default: all",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=2024,
        help="the same seed and Python give the same bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="makes the drawn sets this much smaller or larger (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    for path, num_texts in write_sets(arguments.output, arguments.sets, arguments.seed, arguments.share).items():
        print(f"{path}: {num_texts:,} texts, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
