"""Tokenizes text files into one set for the recipe's `data` section: PREFIX.bin, PREFIX.idx, PREFIX.json.

python tools/prepare_data.py --input books/ notes.jsonl --tokenizer models/Meta-Llama-3-8B --output data/all
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.errors import run_cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments` (those of the process, if None) and prints counts and lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="PATH",
        help=".txt (one document a file), .jsonl (one a line), both also as .gz or .zst, .parquet (one a row), or "
        "folders of them, searched to the bottom; bad documents are skipped and named at the end, up to half of all",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="PATH",
        help="the model's Hugging Face folder, or a sentencepiece .model file",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX",
        help="the set's path without suffix; what the recipe's data section names",
    )  # fmt: skip
    parser.add_argument(
        "--min-tokens", type=int, default=1, metavar="N",
        help="drop documents with fewer tokens; for sets of long texts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N",
        help="tokenizing processes; the result is the same for any number (default: one a core, %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--text-key", default="text", metavar="KEY",
        help="the text's key in .jsonl lines and its column in .parquet files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing set")
    given = parser.parse_args(arguments)
    from longred_megatron.data.prepare import prepare  # takes long

    report = prepare(
        given.input,
        given.tokenizer,
        given.output,
        min_tokens=given.min_tokens,
        workers=given.workers,
        text_key=given.text_key,
        overwrite=given.overwrite,
    )
    print(report.summary())
    print(f"{given.output}.bin, .idx and .json written")


if __name__ == "__main__":
    run_cli(main)
