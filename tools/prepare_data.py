r"""Tokenizes text files into one set for the recipe's `data` section: PREFIX.bin, PREFIX.idx, PREFIX.json.

Examples:
    python tools/prepare_data.py --input books/ notes.jsonl --tokenizer models/Meta-Llama-3-8B --output data/all

    # long documents become 70 % of the tokens, by repeating them; for sets of long texts
    python tools/prepare_data.py --input c4/ --tokenizer models/Meta-Llama-3-8B --output data/long_c4 \
        --long-share 0.7 --max-copies 8
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.errors import UserError, run_cli


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from longred_megatron.data.upsampling import LONG_TOKENS, MAX_COPIES

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
        "--long-share", type=float, metavar="S",
        help="repeat long documents until they are this share of the set's tokens, 0 to 1; the others all stay",
    )  # fmt: skip
    parser.add_argument(
        "--long-tokens", type=int, metavar="N", help=f"what a long document has at least (default: {LONG_TOKENS})"
    )
    parser.add_argument(
        "--max-copies", type=int, metavar="N",
        help=f"how often one document may be in the set for that (default: {MAX_COPIES})",
    )  # fmt: skip
    parser.add_argument(
        "--bos",
        action="store_true",
        help="begin each document with the token with which the tokenizer opens a text, as evaluation does",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N",
        help="tokenizing processes; the result is the same for any number (default: one a core, %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--text-key", default="text", metavar="KEY",
        help="the text's key in .jsonl lines and its column in .parquet files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing set")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments` (those of the process, if None) and prints counts and lengths."""
    given = parse(arguments)
    limits = {key: value for key in ("long_tokens", "max_copies") if (value := getattr(given, key)) is not None}
    if limits and given.long_share is None:
        raise UserError(
            "--long-tokens and --max-copies have no effect without --long-share; give it, or leave them out"
        )
    from longred_megatron.data.prepare import prepare  # takes long
    from longred_megatron.data.upsampling import LongShare

    report = prepare(
        given.input,
        given.tokenizer,
        given.output,
        min_tokens=given.min_tokens,
        workers=given.workers,
        text_key=given.text_key,
        overwrite=given.overwrite,
        bos=given.bos,
        long_share=None if given.long_share is None else LongShare(given.long_share, **limits),
    )
    print(report.summary())
    print(f"{given.output}.bin, .idx and .json written")


if __name__ == "__main__":
    run_cli(main)
