"""Files and folders that appear whole: a process that is killed while it writes leaves none of them half-written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # ends the name of what is not whole yet


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A free path beside `path`, to write a file or a folder at; it becomes `path` when the block ends.

    The folder above is made. A file, or an empty folder, that is at `path` already is replaced. When the block fails
    it stays as it was, and what was written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    _remove(partial)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, and its folder, at once."""
    with appearing_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # no-op for a file
    path.unlink(missing_ok=True)
