"""What came of a case: what it printed and left, against what a user should see."""

import hashlib
import pickle
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.hostile.case import Case

MESSAGE = r"^(?:[^:\n]*: )?error: "

type Snapshot = dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What came of a case. code: negative for a signal; leftovers: what changed that may not."""

    case: Case
    code: int
    stdout: str
    stderr: str
    leftovers: tuple[str, ...]
    seconds: float
    complaints: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.complaints

    @property
    def first_line(self) -> str:
        lines = [line for line in self.stderr.splitlines() if re.match(MESSAGE, line)]
        return (lines or self.stderr.splitlines() or self.stdout.splitlines() or [""])[0]


class Ended(Protocol):
    """A child that has ended. place: its folder; seconds: it ran; started, signalled: when, by `time.monotonic`."""

    case: Case | None
    place: Path
    code: int
    seconds: float
    limit: float
    started: float
    signalled: float | None
    left_processes: bool

    @property
    def stdout(self) -> str: ...

    @property
    def stderr(self) -> str: ...

    @property
    def work(self) -> Path: ...


def judge(child: Ended) -> Outcome:
    case, place = child.case, child.place
    assert case is not None
    stdout, stderr = child.stdout, child.stderr
    leftovers: tuple[str, ...] = ()
    complaints = []
    if not (place / "before").exists():
        complaints.append(f"the case cannot be prepared: {stderr[-600:]}")
    else:
        before: Snapshot = pickle.loads((place / "before").read_bytes())
        leftovers = tuple(_changes(before, snapshot(place / "here"), case, child.code))
        complaints += _complaints(case, child, stdout, stderr)
        complaints += [f"left: {', '.join(leftovers[:6])}"] if leftovers else []
        if case.check and (found := case.check(child.work)):
            complaints.append(found)
    return Outcome(case, child.code, stdout, stderr, leftovers, child.seconds, tuple(complaints))


def _changes(before: Snapshot, after: Snapshot, case: Case, code: int) -> Iterator[str]:
    allowed = [f"work/{path}" for path in (*case.writes, *(["out"] if code == 0 else []))]
    for path in sorted(before.keys() | after.keys()):
        same = before.get(path) == after.get(path)
        if same or any(path == each or path.startswith(f"{each}/") for each in allowed):
            continue
        kind = "+" if path not in before else "-" if path not in after else "~"
        yield f"{kind}{path.removeprefix('work/')}"


def _complaints(case: Case, child: Ended, stdout: str, stderr: str) -> Iterator[str]:
    if child.seconds > child.limit:
        yield f"took more than {child.limit:.0f} s"
    elif child.code not in case.codes:
        yield f"exit code {child.code}, not {' or '.join(map(str, case.codes))}"
    if "Traceback" in stdout + stderr:
        yield f"a traceback: {(stderr.strip() or stdout.strip()).splitlines()[-1]}"
    messages = re.findall(MESSAGE, stderr, re.MULTILINE)
    if child.code == 2 and len(messages) != 1:
        yield f"{len(messages)} messages"
    if child.code in case.codes:
        text = stderr if child.code == 2 else stdout + stderr
        yield from (f"does not say /{p}/" for p in case.says if not re.search(p, text, re.IGNORECASE))
    if child.left_processes and not case.background:
        yield "left processes"
    yield from _late(case, child)


def _late(case: Case, child: Ended) -> Iterator[str]:
    if case.interrupt is None:
        return
    if child.signalled is None:
        yield "ended before it was interrupted"
    elif (after := child.started + child.seconds - child.signalled) > case.interrupt.within_seconds:
        yield f"ended {after:.1f} s after the signal"


def snapshot(folder: Path) -> Snapshot:
    """Every path below `folder`, and what is there: kind, mode, content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(folder))] = f"{mode:o} {content}"
    return found
