"""Kills a run again and again, at random moments, and compares what it ends with to a run that was left alone.

    make chaos

The run trains every kind of objective on two ranks; each kill -9 hits one of them or both, while they load, train or
save, every other time beside the training. The final weights and metrics have to be the same bits.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from longred_megatron.parallel.local_ranks import training_command
from tests.objectives.examples import all_kinds
from tests.training.workspace import make_workspace, read_metrics, without_times, write_recipe

RANKS = 2


def command(recipe: Path, run: Path, *overrides: str) -> list[str]:
    return [*training_command(recipe, RANKS), f"run.dir={run}", *overrides]


def start(recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(recipe, run, *overrides), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill_once(recipe: Path, run: Path, rng: random.Random, async_save: bool) -> str | None:
    """Starts the run and kills it some time after it has begun to work; None if it was done before."""
    agent = start(recipe, run, f"training.async_save={str(async_save).lower()}")
    beats = run / "ranks"
    while len(list(beats.glob("rank-*.json"))) < RANKS and agent.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 4))
    if agent.poll() is not None:
        return None
    saving = any((run / "checkpoints").glob("*.partial"))
    pids = ranks_of(agent)
    chosen = pids if rng.random() < 0.5 else [rng.choice(pids)]
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)
    agent.wait(timeout=120)
    for path in beats.glob("rank-*.json"):
        path.unlink()
    return f"{'both ranks' if len(chosen) == RANKS else 'one rank'}{', while saving' if saving else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=150, help="of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        training = {"steps": arguments.steps, "checkpoint_every_steps": 3, "hang_minutes": 1.0}
        make_workspace(folder, precision={"params": "bf16"}, training=training)
        recipe = write_recipe(folder, objectives=all_kinds(4))
        subprocess.run(command(recipe, folder / "calm"), check=True, stdout=subprocess.DEVNULL)
        for number in range(1, arguments.kills + 1):
            what = kill_once(recipe, folder / "killed", rng, async_save=number % 2 == 0)
            if what is None:
                sys.exit(f"the run was done after {number - 1} kills: use more --steps")
            saved = sorted(path.name for path in (folder / "killed" / "checkpoints").glob("step-*[0-9]"))
            print(f"kill {number}: {what}; newest checkpoint {saved[-1] if saved else 'none'}", flush=True)
        subprocess.run(command(recipe, folder / "killed"), check=True, stdout=subprocess.DEVNULL)
        calm, killed = (load_file(folder / name / "hf" / "model.safetensors") for name in ("calm", "killed"))
        different = [name for name in calm if not torch.equal(calm[name], killed[name])]
        metrics = [without_times(read_metrics(folder / name)) for name in ("calm", "killed")]
        if different or metrics[0] != metrics[1]:
            sys.exit(f"the killed run ends differently: {different or 'metrics'}")
    print(f"{arguments.kills} kills: {len(calm)} tensors and {len(metrics[0])} lines of metrics equal bit for bit")


if __name__ == "__main__":
    main()
