"""The checkpoints of a run, and each of them as a Hugging Face folder."""

import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from longred_megatron.errors import UserError
from longred_megatron.files import reason


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints of a run folder, oldest first."""
    found = [(re.fullmatch(r"step-(\d{6,})", p.name), p) for p in (run / "checkpoints").glob("step-*") if p.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoints_to_study(run: Path) -> list[tuple[int, Path]]:
    """As `checkpoints`. Raises `UserError` when there is none, or the folder cannot be read."""
    try:
        if found := checkpoints(run):
            return found
    except (OSError, ValueError) as error:
        raise UserError(f"--runs {run}: {reason(error)}; give the run.dir of a run") from None
    raise UserError(f"--runs {run}: no run folder with checkpoints; give the run.dir of a run that has saved one")


@contextmanager
def exported(checkpoint: Path) -> Iterator[Path]:
    """A Hugging Face folder with the model of a checkpoint; a temporary one, written by a process of its own."""
    with tempfile.TemporaryDirectory(prefix="study-") as temporary:
        hf = Path(temporary) / "hf"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_export, checkpoint, hf).result()
        yield hf


def _export(checkpoint: Path, hf: Path) -> None:
    from longred_megatron.checkpoint.convert import megatron_to_hf  # changes torch on a CPU: see `cpu_shim`

    megatron_to_hf(checkpoint, hf)
