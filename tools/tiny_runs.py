"""What the tools that train the demo's tiny models share: where things lie, texts, and commands run as a user would.

python tools/tiny_runs.py    writes the texts and token files of the demo that are not there yet
"""

import os
import sys
from pathlib import Path

from demo_texts import write_sets
from longred_megatron.device import force_cpu
from longred_megatron.errors import run_cli

ROOT = Path(__file__).resolve().parent.parent
BASE, DEMO, RUNS = ROOT / "tests/assets/tiny_base", ROOT / "demo", ROOT / "runs"
TRAINING_SETS = ("long", "long_keys", "window", "short")
HELD_OUT_SETS = ("held_out_short", "held_out_long")
SEED = 2024

force_cpu()  # the models are tiny, and the numbers in the docs a CPU's


def prepare_texts() -> dict[str, Path]:
    """Writes the demo's texts and indexed data sets that are not there yet; returns the texts by set."""
    from longred_megatron.data.prepare import prepare  # here and below, since it takes long: see `run_cli`

    texts = {name: DEMO / "texts" / f"{name}.jsonl" for name in TRAINING_SETS + HELD_OUT_SETS}
    write_sets(DEMO / "texts", [name for name, path in texts.items() if not path.exists()], SEED)
    for name in TRAINING_SETS:
        prefix = DEMO / "data" / name
        if not prefix.with_suffix(".idx").exists():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            print(f"{name}: {prepare([texts[name]], BASE / 'tokenizer.model', prefix).tokens:,} tokens")
    return texts


def train(recipe: Path | str, *overrides: str) -> None:
    """On two data-parallel ranks, a core each, where there are two: the result does not depend on it."""
    from longred_megatron.parallel.local_ranks import training_command

    run(*training_command(recipe, num_ranks=min(2, os.cpu_count() or 1))[1:], *overrides)


def run(*arguments: object) -> None:
    """Runs a command of the project in a process of its own. Raises `UserError` when it fails."""
    from longred_megatron.parallel.local_ranks import run_to_end

    run_to_end([sys.executable, *map(str, arguments)], ROOT)


if __name__ == "__main__":
    run_cli(lambda: print(*prepare_texts().values(), sep="\n"))
