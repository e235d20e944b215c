from pathlib import Path

import pytest

from longred_megatron.files import appearing_whole, write_text


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
        if is_free:
            with appearing_whole(path) as partial:
                partial.mkdir()
                (partial / "a").touch()
        else:
            with pytest.raises(OSError), appearing_whole(path) as partial:
                partial.mkdir()
        assert [file.name for file in path.iterdir()] == ["a"]
        assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "file").touch()
    (tmp_path / "b.partial").touch()
    for name in ("a", "b"):
        write_text(tmp_path / name, name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
