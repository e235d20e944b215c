"""Runs cases: each in a copy of the bench, in a fork of this process, which has imported all and runs no threads."""

import atexit
import ctypes
import importlib
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.hostile import bench
from tests.hostile.case import Case
from tests.hostile.judge import Outcome, judge, snapshot

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    name: ROOT / "tools" / f"{name}.py"
    for name in (
        "prepare_data",
        "evaluate",
        "convert_checkpoint",
        "merge",
        "make_demo_texts",
        "make_smollm2",
        "select_layers",
        "analyze",
        "doctor",
        "study",
        "plan",
        "cache_targets",
        "bench",
    )
}
TRAIN = "longred_megatron.train"
WARM = (
    "torch",
    "transformers",
    "megatron.core",
    "pyarrow.parquet",
    "sentencepiece",
    "yaml",
    TRAIN,
    "longred_megatron.training.rehearsal",
    "longred_megatron.checkpoint.convert",
    "longred_megatron.checkpoint.merging",
    "longred_megatron.data.prepare",
    "longred_megatron.evaluation.evaluate",
    "longred_megatron.analysis.layer_study",
    "longred_megatron.study.run",
    "longred_megatron.planning.command",
    "transformers.models.auto.modeling_auto",
    "tests.hostile.bench",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
    "torch.utils.tensorboard",
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.models.gpt",
    "longred_megatron.training.microbatches",
)
MEMORY_LIMIT_BYTES = 24 << 30  # of addresses: torch maps many that it never uses
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
BUILD_SECONDS = 120.0
GRACE_SECONDS = 3.0


def warm() -> None:
    """Imports everything, so that a child starts in milliseconds."""
    os.environ.update(QUIET)
    sys.path.insert(0, str(ROOT / "tools"))
    for name in WARM:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def run_cases(cases: Iterable[Case], folder: Path, jobs: int = 2) -> Iterator[Outcome]:
    """Runs cases side by side below `folder`, a bench for each place; yields outcomes as they come."""
    places = [folder / f"place-{number}" for number in range(jobs)]
    for building in [Child(place, lambda place=place: _build(place), BUILD_SECONDS) for place in places]:
        if (code := building.wait()) != 0:
            raise RuntimeError(f"the bench cannot be built ({code}): {building.stderr[-2000:]}")
    for place in places:
        (place / "here").rename(place / "bench")
    waiting, running, tries = list(cases)[::-1], {}, Counter()
    while waiting or running:
        for place in places:
            if place not in running and waiting:
                case = waiting.pop()
                running[place] = Child(place, lambda place=place, case=case: _run(place, case), case.seconds, case)
            if place in running and running[place].ended():
                child = running.pop(place)
                outcome = judge(child)
                tries[id(outcome.case)] += 1
                if outcome.ok or tries[id(outcome.case)] >= (6 if child.missed else 2):
                    yield outcome
                else:  # again, at the end: signals and seconds depend on what else the machine does
                    waiting.insert(0, outcome.case)
        time.sleep(0.005)


class Child:
    """A forked process that calls `function` with its output in files, in a process group of its own."""

    def __init__(self, place: Path, function: Callable[[], Any], seconds: float, case: Case | None = None) -> None:
        self.place, self.case, self.code = place, case, 0
        place.mkdir(parents=True, exist_ok=True)
        (place / "before").unlink(missing_ok=True)
        (place / "stdin").write_text("y\n" * 100)  # yes to whatever is asked
        self.started, self.signalled, self.limit = time.monotonic(), None, seconds
        self._pipes, self._printed = (os.pipe(), os.pipe()), (bytearray(), bytearray())
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            become(function, place / "stdin", *(writing for _, writing in self._pipes))
        for reading, writing in self._pipes:
            os.close(writing)
            os.set_blocking(reading, False)

    def ended(self) -> bool:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self._read()
        if pid:
            self.seconds = time.monotonic() - self.started
            self.code = os.waitstatus_to_exitcode(status)
            self._end_group()
            for reading, _ in self._pipes:
                os.close(reading)
            return True
        self._interrupt()
        if time.monotonic() - self.started > self.limit:
            os.killpg(self.pid, signal.SIGKILL)
        return False

    def wait(self) -> int:
        while not self.ended():
            time.sleep(0.02)
        return self.code

    @property
    def stdout(self) -> str:
        return self._printed[0].decode(errors="replace").replace("\0", "")

    @property
    def stderr(self) -> str:
        return self._printed[1].decode(errors="replace").replace("\0", "")

    def _read(self) -> None:
        for (reading, _), printed in zip(self._pipes, self._printed, strict=True):
            with suppress(BlockingIOError):
                while block := os.read(reading, 1 << 16):
                    printed += block

    def _interrupt(self) -> None:
        interrupt = self.case.interrupt if self.case else None
        if interrupt and self.signalled is None and (self.place / "before").exists() and interrupt.when(self.work):
            os.kill(self.pid, interrupt.number)
            self.signalled = time.monotonic()

    def _end_group(self) -> None:
        """Ends the processes that this one has left; helpers that end by themselves get a moment for it."""
        until = time.monotonic() + GRACE_SECONDS
        while (left := _living(self.pid)) and time.monotonic() < until:
            time.sleep(0.05)
        self.left_processes = bool(left)
        if left:
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def missed(self) -> bool:
        """It ended before the signal that it should get: on a fast machine the moment may be a short one."""
        return self.case is not None and self.case.interrupt is not None and self.signalled is None

    @property
    def work(self) -> Path:
        return self.place / "here" / "work"


def _living(group: int) -> list[int]:
    """The processes of a group that are no zombies: no parent may be there to bury those."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name) state parent group
            state, _, own_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(own_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def become(function: Callable[[], Any], stdin: Path, stdout: int, stderr: int) -> NoReturn:
    """In a child: calls `function` as a program of its own. Never returns to the parent's frames."""
    code = 1
    try:
        os.setsid()
        for number, file in enumerate((os.open(stdin, os.O_RDONLY), stdout, stderr)):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        try:
            function()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except KeyboardInterrupt:
            code = 130  # before the command has set its handlers
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _build(place: Path) -> None:
    work = place / "here" / "work"
    for folder in (work, place / "here" / "tmp", place / "here" / "home"):
        folder.mkdir(parents=True)
    bench.write_inputs(work)
    os.chdir(work)
    for command in bench.COMMANDS:
        pid = os.fork()
        if pid == 0:
            become(lambda command=command: call(command), place / "stdin", 1, 2)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise RuntimeError(" ".join(command))


def _run(place: Path, case: Case) -> None:
    here = place / "here"
    remove(here)
    shutil.copytree(place / "bench", here, symlinks=True)
    work = here / "work"
    try:
        os.chdir(work)
        case.prepare(work)
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    (place / "writing").write_bytes(pickle.dumps(snapshot(here)))
    (place / "writing").rename(place / "before")  # whole: a signal may come as soon as it is there
    os.environ.update(TMPDIR=str(here / "tmp"), HOME=str(here / "home"))
    for name, value in case.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    if case.file_limit_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_limit_bytes,) * 2)
    if case.unprivileged:
        _obey_permissions()
    command = tuple(word.replace("{here}", str(work)) for word in case.command)
    call(command) if case.forked else _exec(command)


def _obey_permissions() -> None:
    """Root, too: gives up the capabilities to pass over the permissions of files (capset of linux/capability.h)."""
    libc = ctypes.CDLL(None)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for word in (0, 1):  # effective, permitted; bits 1 and 2: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        data[word] &= ~0b110
    if libc.capset(header, data) != 0:
        raise OSError("capset")


def call(command: tuple[str, ...]) -> None:
    """The program's own last lines, as Python runs them, in this process."""
    program, *arguments = command
    import tempfile

    tempfile.tempdir = None
    sys.argv = [program, *arguments]
    if program == "train":
        sys.modules.pop(TRAIN, None)
        runpy.run_module(TRAIN, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(PROGRAMS[program]), run_name="__main__")


def _exec(command: tuple[str, ...]) -> None:
    program, *arguments = command
    os.environ |= {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(ROOT / "build" / "matplotlib")}
    if program == "sh":
        os.execvp("bash", ["bash", "-c", arguments[0]])
    start = ["-m", TRAIN] if program == "train" else [str(PROGRAMS[program])]
    os.execv(sys.executable, [sys.executable, *start, *arguments])


def remove(folder: Path) -> None:
    """Removes a folder, and in it those that a case has locked."""
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
