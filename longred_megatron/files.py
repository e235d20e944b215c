"""Outputs: tried before the work, whole when they appear, and nothing that is not this program's removed for them.

Inputs: read only where they are regular files of a sane size.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longred_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"  # ends the name of what is not whole yet
MARKER = ".made-by-longred-megatron"  # a file in each unfinished folder: nothing in it is the user's

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a folder of its path is a file",
    errno.ENAMETOOLONG: "a name of its path is too long",
    errno.ELOOP: "a link of its path leads to itself",
}


def reason(error: BaseException) -> str:
    """Why a path cannot be used, in words: of an OSError the system's reason, of others their message."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        text = _REASONS.get(error.errno, error.strerror or text)
    return " ".join(text.split())


def try_output(path: Path, key: str) -> None:
    """Finds out whether a file or a folder can be written at `path`, by writing beside it. Leaves nothing behind.

    key: what the user calls the path, for the message: `--output`, `run.dir`.

    Raises:
        UserError: it cannot, with the reason.
    """
    new: list[Path] = []
    try:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{key} {path}: a link to {path.readlink()}, which does not exist; remove it")
        new = _new_parents(path)
        trial = (path if path.is_dir() else path.parent) / _unfinished_name(path.name)
        try:
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b" ")
        finally:
            trial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UserError(f"{key} {str(path)!r}: cannot be written ({reason(error)}); choose another") from None
    finally:
        _remove_empty(new)


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A free path beside `path` to write a file at; it becomes `path` when the block ends.

    The folder above is made. A file that is at `path` already is replaced. When the block fails it stays as it was, and
    what was written is removed.
    """
    with without_new_parents(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(_unfinished_name(path.name))
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def without_new_parents(path: Path) -> Iterator[None]:
    """Removes, when the block fails, the folders above `path` that were made in it and are empty."""
    new = _new_parents(path)
    try:
        yield
    except BaseException:
        _remove_empty(new)
        raise


def _new_parents(path: Path) -> list[Path]:
    """The folders above `path` that do not exist, innermost first."""
    return [folder for folder in path.absolute().parents if not folder.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError, ValueError):  # ValueError: a NUL, so that it could not be made either
            folder.rmdir()


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into; it becomes `path`, which may be an empty folder, when the block ends.

    When the block fails it is removed.

    Raises:
        UserError: see `begin_folder`.
    """
    with without_new_parents(path), removed_on_failure(path):
        yield begin_folder(path)
        finish_folder(path)


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Removes, when the block fails, the folder that `begin_folder` made for `path` in it."""
    try:
        yield
    except BaseException:
        remove_unfinished(path.with_name(path.name + PARTIAL))
        raise


def begin_folder(path: Path) -> Path:
    """Makes the folder that `finish_folder` renames to `path`. One that a killed process left is removed.

    Raises:
        UserError: what is in its place was not made by this program.
    """
    partial = path.with_name(path.name + PARTIAL)
    if not remove_unfinished(partial):
        raise UserError(f"{partial}: was not made by this program, which needs the name; move it away")
    partial.mkdir(parents=True)
    (partial / MARKER).touch()
    return partial


def finish_folder(path: Path) -> None:
    """Gives the folder of `begin_folder` its name."""
    path.with_name(path.name + PARTIAL).replace(path)
    (path / MARKER).unlink()


def remove_unfinished(partial: Path) -> bool:
    """Removes an unfinished folder of this program. False: something else is there, and stays."""
    with suppress(OSError):  # another rank may be writing into it, or removing it
        if (partial / MARKER).is_file() and not partial.is_symlink():
            for child in partial.iterdir():
                if child.name != MARKER:
                    _remove(child)
            # The marker goes last: a removal that was interrupted can be taken up again.
            if [child.name for child in partial.iterdir()] == [MARKER]:
                (partial / MARKER).unlink()
        partial.rmdir()
    return not os.path.lexists(partial)


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a UTF-8 file.

    Raises OSError, or ValueError for what cannot be read to its end (a pipe, a device), is larger than `max_bytes`, or
    is not UTF-8; `reason` has them in words.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file but a folder, a pipe or a device")
    if status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {max_bytes:,} such a file may have")
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: Path, max_bytes: int = 2**26) -> Any:
    """The content of a JSON file. Raises OSError, or ValueError also for a key given twice and for deep nesting."""
    text = read_text(path, max_bytes)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def save_tensors(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file. Raises OSError, which safetensors has in words only."""
    from safetensors import SafetensorError  # here, and not for every command's --help
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, and its folder, at once."""
    with appearing_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return values


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unfinished_name(name: str) -> str:
    """No other process, and no user, has a file of this name."""
    return f".{name}.{secrets.token_hex(4)}{PARTIAL}"
