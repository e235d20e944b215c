"""How a command ends: one message for a user's mistake, one line for what is unexpected, never a traceback."""

import errno
import io
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# Waits for torchrun, then says the message again, below torchrun's own page. A zombie is gone, too: who waits for the
# end of our output may collect it only later.
_LAST_WORD = """
import os, sys, time
def state():
    try:
        return open(f"/proc/{sys.argv[1]}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
end = time.monotonic() + 30
while state() not in "ZX" and time.monotonic() < end:
    time.sleep(0.05)
os.write(2, sys.argv[2].encode(errors="backslashreplace") + b"\\n")
"""
_LONGEST_REASON = 500  # characters of an unexpected error's message that are shown; the file has all
# No fault of the program: disks and permissions, and paths.
_SURROUNDINGS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR),
)

_report_folders: list[Path] = []  # the last one that exists gets the traceback


class UserError(Exception):
    """Something the user can fix. Holds every problem found, each a sentence that says what to change."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def report_beside(folder: Path) -> None:
    """From now on the traceback of what is unexpected goes into `folder`, if it exists; else into the temporary one."""
    _report_folders.append(folder)


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Runs a command line and ends the process.

    Exit code 0 when `main` returns, 2 with the message for a `UserError`, 130 for Ctrl-C, 143 for SIGTERM (both are a
    SystemExit inside `main`), 141 when nobody reads the output any more, 1 for what is unexpected: one line, and the
    traceback in a file. What takes long to import belongs inside `main`: before it, a signal ends in a traceback.
    """
    stop = _Stop()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII locale
    code: int | str | None = 0
    message = ""
    try:
        _check_working_directory()
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # MemoryError and a Rust panic, too
        # Where a signal was received, its SystemExit became another error on its way.
        code, message = (128 + stop.received, "") if stop.received else _end_of(error)
    stop.end()
    if message:
        with suppress(OSError, ValueError):  # nobody reads, or it is closed
            print(message, file=sys.stderr, flush=True)
        repeat_below_torchrun(message)
    if not _stdout_takes():  # or the interpreter tries once more, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _leave(code)


def _leave(code: int | str | None) -> NoReturn:
    """Ends the process; at once, if it is still in a world: the interpreter's own end would wait for collectives."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def plain(text: str) -> str:
    """One line that does nothing to a terminal: blanks for line breaks, escapes for what cannot be printed."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def multiples(value: int, of: int) -> str:
    """The multiples of `of` on both sides of `value`, from `of` on, for a message."""
    below, above = value // of * of, -(-value // of) * of
    return listed([below, above] if 0 < below < above else [above])


def listed(values: Iterable[Any]) -> str:
    """Comma-separated, for a message."""
    return ", ".join(str(value) for value in values)


def first_few(values: Sequence[Any], most: int = 5) -> str:
    """The first of them, comma-separated, and how many more there are, for a message."""
    return listed(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def _check_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory has been removed; change to another") from None


class _Stop:
    """Ctrl-C and SIGTERM as a SystemExit in the main thread, which no library keeps.

    Imports and callbacks have `except:` around code of others. As long as the main thread runs on without the
    exception, the signal is sent again.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and a script's `&`
                signal.signal(number, self._raise)
        sys.unraisablehook = self._dropped

    def end(self) -> None:
        """While the interpreter shuts down, a signal just ends it."""
        self._is_over.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            threading.Thread(target=self._insist, args=(number,), daemon=True).start()
        self.received = number
        sys.exit(128 + number)

    def _insist(self, number: int) -> None:
        while not self._is_over.wait(0.3):
            if _is_leaving(sys._current_exceptions().get(threading.main_thread().ident or 0)):
                continue
            is_ours = signal.getsignal(number) == self._raise
            os.kill(os.getpid(), number)
            if not is_ours:  # training has a handler of its own by now, which has been told
                return

    def _dropped(self, unraisable: Any) -> None:
        """Of a callback from C: the garbage collector's, a destructor's."""
        if not isinstance(unraisable.exc_value, SystemExit):
            sys.__unraisablehook__(unraisable)


def _is_leaving(error: BaseException | None) -> bool:
    """Whether a SystemExit is on its way through `finally` and `with`, where another error may be handled."""
    while error is not None:
        if isinstance(error, SystemExit):
            return True
        error = error.__context__
    return False


def _end_of(error: BaseException) -> tuple[int, str]:
    """Exit code and message."""
    if isinstance(error, UserError):
        return 2, _listed_problems(error.problems)
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {plain(f'{where}{error.strerror}')}; correct the path, its permissions or the free space"
    return 1, _unexpected(error)


def _listed_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"error: {plain(problems[0])}"
    return "\n".join([f"error: {len(problems)} problems:", *(f"  - {plain(problem)}" for problem in problems)])


def _unexpected(error: BaseException) -> str:
    """Writes the traceback to a file and returns the line for the user."""
    what = plain(f"{type(error).__name__}: {error}")
    if len(what) > _LONGEST_REASON:
        what = what[:_LONGEST_REASON] + " ..."
    trace = "".join(traceback.format_exception(error))
    for folder in (*reversed(_report_folders), Path(tempfile.gettempdir())):
        with suppress(OSError, ValueError):
            if folder.is_dir():
                handle, path = tempfile.mkstemp(".txt", "unexpected-error-", folder)
                with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{sys.argv}\n{trace}")
                return f"unexpected error: {what}; this is a bug: please report it with the file {plain(path)}"
    return f"unexpected error: {what}; this is a bug: please report it with the command that you ran"


def _nobody_reads() -> bool:
    """Whether standard output is a pipe (or socket) whose other end is closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _stdout_takes() -> bool:
    """Whether what was printed can be written out."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def repeat_below_torchrun(message: str) -> None:
    """torchrun prints a page of its own when a rank fails: a small process, which ends with it, has the last word."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(OSError):  # the message was printed once
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAST_WORD, str(os.getppid()), message.replace("\0", "")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # torchrun ends the group of each rank
            )
