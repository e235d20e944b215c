#!/usr/bin/env python
"""The main job, small and real, on a CPU: a tiny model's window grows from 512 to 2048 tokens, twice.

    make demo

Converts tests/assets/tiny_base, prepares texts of this machine's Python, extends the model by LongReD-C and by Long
CPT on equally many long-text tokens, exports both and compares them with the original. What is there already is not
made again.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from longred_megatron.data.prepare import prepare
from longred_megatron.data.synthetic import write_sets
from longred_megatron.errors import UserError, run_cli
from longred_megatron.evaluation.evaluate import Settings, evaluate
from longred_megatron.evaluation.report import PAGE, format_table
from longred_megatron.parallel.local_ranks import training_command

ROOT = Path(__file__).resolve().parent.parent
BASE, DEMO, RUNS = ROOT / "tests/assets/tiny_base", ROOT / "demo", ROOT / "runs"
TRAINING_SETS = ("long", "long_keys", "window", "short")
HELD_OUT_SETS = ("held_out_short", "held_out_long")
SEED = 2024


def main() -> None:
    disable_progress_bar()  # transformers', for weights that load in no time
    started = time.perf_counter()
    _say(1, "check that the base model converts to Megatron and back")
    _run(
        "tools/convert_checkpoint.py",
        "hf-to-megatron",
        "--hf",
        BASE,
        "--output",
        DEMO / "megatron",
        made=DEMO / "megatron",
    )
    _run("tools/convert_checkpoint.py", "verify", "--hf", BASE, "--checkpoint", DEMO / "megatron")
    _say(2, "prepare texts of the Python standard library")
    texts = {name: DEMO / "texts" / f"{name}.jsonl" for name in TRAINING_SETS + HELD_OUT_SETS}
    write_sets(DEMO / "texts", [name for name, path in texts.items() if not path.exists()], SEED)
    for name in TRAINING_SETS:
        prefix = DEMO / "data" / name
        if not prefix.with_suffix(".idx").exists():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            print(f"{name}: {prepare([texts[name]], BASE / 'tokenizer.model', prefix).tokens:,} tokens")
    _say(3, "extend the window by Long CPT: cross-entropy on long texts")
    _train("recipes/tiny_long_cpt.yaml")
    _say(
        4,
        "extend the window by LongReD-C: the same long texts, and what the original model does on short ones",
    )
    _train("recipes/tiny_longred_c.yaml")
    _say(5, "compare")
    report = evaluate(
        [BASE, RUNS / "tiny_long_cpt/hf", RUNS / "tiny_longred_c/hf"],
        DEMO / "report",
        settings=Settings(short_texts=(texts["held_out_short"],), long_texts=(texts["held_out_long"],)),
        names=("original", "Long CPT", "LongReD-C"),
        command="make demo",
    )
    print(format_table(report))
    print(f"\nThe page with the plots: {DEMO / 'report' / PAGE}")
    print(f"The extended model: {RUNS / 'tiny_longred_c/hf'}")
    print(f"All in {(time.perf_counter() - started) / 60:.1f} minutes.")


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/5] {what}", flush=True)


def _train(recipe: str) -> None:
    """On two data-parallel ranks, a core each, where there are two: the result does not depend on it."""
    _run(*training_command(recipe, num_ranks=min(2, os.cpu_count() or 1))[1:])


def _run(*arguments: object, made: Path | None = None) -> None:
    """Runs a command of the project in a process of its own, as a user would; not if `made` exists."""
    if made is not None and made.exists():
        return
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment)
    if done.returncode:
        raise UserError(
            f"`{' '.join(map(str, arguments))}` failed with exit code {done.returncode}; its message is above"
        )


if __name__ == "__main__":
    run_cli(main)
