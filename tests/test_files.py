import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from longred_megatron.errors import UserError
from longred_megatron.files import MARKER, appearing_folder, appearing_whole, begin_folder, try_output, write_text


def test_a_file_is_replaced_at_once_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old é")
    with appearing_whole(path) as partial:
        assert not partial.exists() and partial.parent == path.parent
        partial.write_text("new")
        assert path.read_text(encoding="utf-8") == "old é"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), appearing_whole(path) as partial:
        partial.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    for is_free in (True, False):
        with nullcontext() if is_free else pytest.raises(OSError), appearing_folder(path) as partial:
            (partial / ("a" if is_free else "b")).touch()
        assert [file.name for file in path.iterdir()] == ["a"]
        assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    left = begin_folder(tmp_path / "a")
    (left / "folder").mkdir()
    (left / "folder" / "file").touch()
    with appearing_folder(tmp_path / "a") as partial:
        assert [file.name for file in partial.iterdir()] == [MARKER]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not any((tmp_path / "a").iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_this_program_did_not_make_stays(tmp_path: Path, kind: str) -> None:
    theirs = tmp_path / "a.partial"
    if kind == "folder":
        theirs.mkdir()
        (theirs / "thesis").touch()
    elif kind == "file":
        theirs.touch()
    else:
        theirs.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.partial: was not made by this program"):
        begin_folder(tmp_path / "a")
    write_text(tmp_path / "a", "text")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "a.partial", *["thesis"] * (kind == "folder")]


BAD_OUTPUTS = {
    "x" * 300: "a name of its path is too long",
    "file/below": "a folder of its path is a file",
    "nul\0": "embedded null byte",
    "link": "a link to nowhere, which does not exist",
    "loop": "leads to itself|which does not exist",
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_outputs_are_tried(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"(?s)^--output .*({BAD_OUTPUTS[name]})"):
        try_output(tmp_path / name, "--output")
    assert sorted(tmp_path.rglob("*")) == before


def test_good_outputs_are_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    for name in ("folder", "file", "new", "new/below/it"):
        try_output(tmp_path / name, "--output")
        assert sorted(tmp_path.rglob("*")) == before


def test_no_permission_and_a_full_disk_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, said in ((errno.EACCES, "no permission"), (errno.ENOSPC, "the disk is full")):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(UserError, match=said):
            try_output(tmp_path / "a", "--output")
    assert not any(tmp_path.iterdir())
