"""Is the training of another checkout of this project bit for bit this one's?

    python -m tests.unchanged CHECKOUT

CHECKOUT (a `git worktree` of the commit before a change) writes a small copy of every recipe in its recipes/: fp32, one
process, random weights and texts. Both checkouts train three steps of each, and every line of metrics (but times and
memory) and every bit of the exported weights are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
UNMEASURED = ("second", "memory", "utilization")
# Run by the other checkout, so that what is compared are recipes as it knows them.
WRITER = """
import sys
from pathlib import Path
from tests.training.test_rehearsal import RECIPES, dump_recipe, shrunk
ALONE = [f"parallel.{key}={value}" for key, value in dict(
    tensor=1, pipeline=1, virtual_pipeline="null", context=1, sequence="false").items()]
folder = Path(sys.argv[1])
for path in sorted(RECIPES.glob("*.yaml")):
    if path.stem in ("llama3_8b_32k", "tiny_512") or path.stem.startswith("tiny_base"):
        continue  # bases of others
    (folder / path.stem).mkdir()
    small = shrunk(path.stem, folder / path.stem, *ALONE, "precision.params=fp32").recipe
    if small.phases:
        small.phases[-1].setdefault("training", {})["steps"] = 2
    (folder / path.stem / "recipe.yaml").write_text(dump_recipe(small))
"""


def run(checkout: Path, *arguments: str) -> None:
    """A Python command in a checkout, on one thread; what it prints is shown when it fails."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments[:3])} failed:\n{done.stdout}{done.stderr}")


def outcome(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not any(part in k for part in UNMEASURED)} for line in lines]
    return metrics, load_file(folder / "hf" / "model.safetensors")


def same(ours: Path, theirs: Path) -> bool:
    (our_metrics, our_weights), (their_metrics, their_weights) = outcome(ours), outcome(theirs)
    return (
        our_metrics == their_metrics
        and our_weights.keys() == their_weights.keys()
        and all(torch.equal(tensor, their_weights[name]) for name, tensor in our_weights.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of the other commit")
    other = parser.parse_args().checkout.resolve()
    different = []
    with tempfile.TemporaryDirectory(prefix="unchanged-") as temporary:
        folder = Path(temporary)
        run(other, "-c", WRITER, str(folder))
        for recipe in sorted(folder.glob("*/recipe.yaml")):
            name = recipe.parent.name
            runs = {checkout: recipe.parent / f"run-{i}" for i, checkout in enumerate((ROOT, other))}
            for checkout, run_dir in runs.items():
                run(checkout, "-m", "longred_megatron.train", str(recipe), f"run.dir={run_dir}")
            if not same(*runs.values()):
                different.append(name)
            print(f"{name}: {'DIFFERENT' if name in different else 'the same bits'}", flush=True)
    if different:
        sys.exit(f"{len(different)} recipes train otherwise: {', '.join(different)}")


if __name__ == "__main__":
    main()
