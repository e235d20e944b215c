"""What a hostile case is: a folder that is prepared, a command that is run in it, and what a user should see."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

type Prepare = Callable[[Path], None]

# The commands, as words: the program, then arguments that make it work on the bench. All write to `out`.
SMALL = (
    "--short-windows=1",
    "--long-windows=1",
    "--prompt-sets=1",
    "--samples=1",
    "--depths=1",
    "--keys=2",
    "--window=512",
    "--lengths=512",
)
TRAIN = ("train", "recipe.yaml", "run.dir=out", "training.steps=1")
RESUME = ("train", "recipe.yaml", "training.steps=3")  # `run`, of which two steps are done
REHEARSE = ("train", "recipe.yaml", "--rehearse")
PREPARE = ("prepare_data", "--workers", "1", "--tokenizer", "model", "--output", "out/set", "--input")
EVALUATE = ("evaluate", *SMALL, "--text", "corpus", "--output", "out", "--hf")
TO_MEGATRON = ("convert_checkpoint", "hf-to-megatron", "--output", "out", "--hf")
TO_HF = ("convert_checkpoint", "megatron-to-hf", "--output", "out", "--checkpoint")
VERIFY = ("convert_checkpoint", "verify", "--hf", "model", "--checkpoint")
MERGE = ("merge", "--weight", "0.5", "--output", "out", "--hf", "model")
TEXTS = ("--texts=2", "--length=64", "--output", "out")
SELECT = ("select_layers", "recipe.yaml", *TEXTS)
DRIFT = ("analyze", "drift", "--text=corpus", *TEXTS, "--hf")
VECTORS = ("analyze", "positional-vectors", "--text=corpus", *TEXTS, "--window=32", "--hf")
PERTURBATION = ("analyze", "perturbation", "--text=corpus", *TEXTS, "--copies=2", "--hf")
QUERIES = ("analyze", "query-states", "--text=corpus", *TEXTS, "--hf")
FP8 = ("analyze", "fp8", "--text=corpus", "--windows=1", "--lengths=64", "--output", "out", "--hf")
DOCTOR = ("doctor", "recipe.yaml", "--output", "out")
STUDY = ("study", "study.yaml", "--output", "out")
PLAN = ("plan", "recipe.yaml", "precision.params=bf16", "--gpu=h100-80gb", "--gpus=2", "--output", "out")
CACHE = ("cache_targets", "recipe.yaml", "teacher.cache=out")
BENCH = ("bench", "kernels", "--quick", "--output", "out")
DEMO_TEXTS = ("make_demo_texts", "--sets", "repeats_128", "--share", "0.001", "--output")
SMOLLM2 = ("make_smollm2", "--output", "out", "--gguf")


def as_it_is(folder: Path) -> None:
    """Prepares nothing."""


@dataclass(frozen=True)
class Interrupt:
    """A signal to the running command, as soon as `when` (of its folder) is true."""

    number: signal.Signals
    when: Callable[[Path], bool]
    within_seconds: float = 5.0  # for the end after the signal


@dataclass(frozen=True)
class Case:
    """One thing that can be wrong, and what a user should see of it.

    command: a program of `runner.PROGRAMS`, and its arguments; `{here}` stands for the case's folder.
    says: regular expressions that the message (with exit code 0: all that is printed) holds, whatever their case.
    writes: what may change or appear in the folder, and all below it; with exit code 0 `out` may, too.
    check: looks at the folder afterwards and returns a complaint, or None.
    forked: from the warm process; otherwise a process of its own, for what happens while it starts.
    """

    name: str
    command: tuple[str, ...]
    prepare: Prepare = as_it_is
    code: int | tuple[int, ...] = 2
    says: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    seconds: float = 10.0
    environment: dict[str, str | None] = field(default_factory=dict)
    interrupt: Interrupt | None = None
    check: Callable[[Path], str | None] | None = None
    forked: bool = True
    unprivileged: bool = False
    background: bool = False  # `prepare` has started a process
    file_limit_bytes: int | None = None  # of every file that is written: a full disk
    quick: bool = True

    @property
    def codes(self) -> tuple[int, ...]:
        return (self.code,) if isinstance(self.code, int) else self.code


def payload(folder: Path) -> Path:
    """The file that code from a file would write, were it run."""
    return folder / "payload"


def ran_code(folder: Path) -> str | None:
    return "code from a file was run" if payload(folder).exists() else None


def in_turn(*steps: Prepare) -> Prepare:
    def prepare(folder: Path) -> None:
        for step in steps:
            step(folder)

    return prepare


def writing(path: str, content: str | bytes) -> Prepare:
    """Writes a file of the case's folder."""

    def prepare(folder: Path) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def editing(path: str, change: Callable[[bytes], bytes]) -> Prepare:
    """Changes the bytes of a file; of several that the pattern `path` names, the first."""

    def prepare(folder: Path) -> None:
        file = sorted(folder.glob(path))[0]
        file.write_bytes(change(file.read_bytes()))

    return prepare


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    """One byte of the last quarter is another."""
    at = len(content) * 3 // 4
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


def garbage(content: bytes) -> bytes:
    return bytes((7 * i * i + 13) % 256 for i in range(len(content)))


DAMAGES: tuple[Callable[[bytes], bytes], ...] = (truncated, emptied, flipped, garbage)


def damaged(path: str) -> Iterator[tuple[str, Prepare]]:
    """Each kind of damage to a file, by name."""
    for damage in DAMAGES:
        yield damage.__name__, editing(path, damage)
