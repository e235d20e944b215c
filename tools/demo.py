#!/usr/bin/env python
"""The main job, small and real, on a CPU: a tiny model's window grows from 512 to 2048 tokens, twice.

    make demo

Converts tests/assets/tiny_base, prepares texts of this machine's Python, extends the model by LongReD-C and by Long
CPT on equally many long-text tokens, exports both and compares them with the original. What is there already is not
made again.
"""

import argparse
import time

from longred_megatron.errors import run_cli

FP32 = "precision.params=fp32"  # most laptops' CPUs have no instructions for bf16 products


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # Here, since they take seconds: see `run_cli`.
    from longred_megatron.evaluation.evaluate import evaluate
    from longred_megatron.evaluation.report import format_table
    from longred_megatron.evaluation.settings import Settings
    from longred_megatron.page import PAGE
    from tiny_runs import BASE, DEMO, RUNS, prepare_texts, run, train

    started = time.perf_counter()
    _say(1, "check that the base model converts to Megatron and back")
    if not (DEMO / "megatron").exists():
        run("tools/convert_checkpoint.py", "hf-to-megatron", "--hf", BASE, "--output", DEMO / "megatron")
    run("tools/convert_checkpoint.py", "verify", "--hf", BASE, "--checkpoint", DEMO / "megatron")
    _say(2, "prepare texts of the Python standard library")
    texts = prepare_texts()
    _say(3, "extend the window by Long CPT: cross-entropy on long texts")
    train("recipes/tiny_long_cpt.yaml", FP32)
    _say(
        4,
        "extend the window by LongReD-C: the same long texts, and what the original model does on short ones",
    )
    train("recipes/tiny_longred_c.yaml", FP32)
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


if __name__ == "__main__":
    run_cli(main)
