"""Weight files that are damaged or lie: one message that names the file, and nothing outside of the folder is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from longred_megatron.checkpoint.weight_files import INDEX, SINGLE, WeightFiles
from longred_megatron.errors import UserError


def refused(folder: Path, tensor: str = "a") -> str:
    with pytest.raises(UserError) as caught, WeightFiles(folder) as files:
        files.shapes()
        files[tensor][:]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_shards(folder: Path, **shards: dict[str, torch.Tensor]) -> dict[str, str]:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_named(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.ones(8, 4, dtype=dtype)
    weight[5, 1] = weight[5, 2] = bad
    save_file({"a": weight, "b": torch.ones(2)}, tmp_path / SINGLE)
    assert refused(tmp_path).startswith(f"{tmp_path}/{SINGLE}: the tensor a holds 2 NaN or infinite numbers; ")
    with WeightFiles(tmp_path) as files:
        assert files["a"][:5].shape == (5, 4) and files["b"][:].shape == (2,)  # what is read is looked at


def test_a_sum_that_overflows_is_no_mistake(tmp_path: Path) -> None:
    save_file({"a": torch.full((4, 4), 60_000.0, dtype=torch.float16)}, tmp_path / SINGLE)
    with WeightFiles(tmp_path) as files:
        assert files["a"][:].isfinite().all()


def test_a_tensor_in_two_files_names_both(tmp_path: Path) -> None:
    listed = write_shards(tmp_path, x={"a": torch.ones(2), "b": torch.ones(2)}, y={"a": torch.zeros(2)})
    write_index(tmp_path, {"weight_map": listed})
    message = refused(tmp_path)
    assert "x.safetensors and y.safetensors both hold the tensor a" in message


def test_a_tensor_in_another_file_than_listed(tmp_path: Path) -> None:
    ones = torch.ones(2)
    listed = write_shards(tmp_path, x={"a": ones}, y={"b": ones})
    write_index(tmp_path, {"weight_map": listed | {"a": "y.safetensors", "b": "x.safetensors"}})
    assert "tensors that their files do not hold: a, b" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": {"a": "../outside.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "sub/x.safetensors"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "x.bin"}},
        {"weight_map": {"a": "x\0.safetensors"}},
        {"weight_map": {"a": "y" * 300 + ".safetensors"}},
        {"weight_map": {"a": 7}},
        {"weight_map": {"a": ["x.safetensors"]}},
        {"weight_map": {"a": None}},
        {"weight_map": ["x.safetensors"]},
        {"weight_map": {}},
        {"weight_map": None},
        {},
        [],
        None,
        7,
    ],
    ids=lambda content: json.dumps(content)[:50],
)
def test_an_index_that_leads_elsewhere(content: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    write_shards(folder, x={"a": torch.ones(2)})
    write_index(folder, content)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": {"a": "x", "a": "y"}}', "\xff", ""])
def test_an_index_that_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    assert refused(tmp_path).startswith(f"{tmp_path}/{INDEX}: not an index of safetensors files (")


@pytest.mark.parametrize("name", [SINGLE, INDEX])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to("/dev/zero")],
    ids=["pipe", "folder", "dangling", "device"],
)
def test_what_is_no_file_does_not_hang(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    assert str(tmp_path / name) in refused(tmp_path)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        safetensors(b"{}", length=2**40),
        safetensors(b"[" * 100_000),
        safetensors(b'{"a":' * 100_000),
        safetensors(b"[]"),
        safetensors(json.dumps({"a": ENTRY}).encode()),  # without its data
        safetensors(json.dumps({"a": ENTRY | {"shape": [3]}}).encode(), bytes(8)),
        safetensors(json.dumps({"a": ENTRY | {"shape": [-2]}}).encode(), bytes(8)),
        safetensors(json.dumps({"a": ENTRY | {"shape": [2**63, 2**63]}}).encode(), bytes(8)),
        safetensors(json.dumps({"a": ENTRY | {"data_offsets": [8, 0]}}).encode(), bytes(8)),
        safetensors(json.dumps({"a": ENTRY | {"data_offsets": [0, 2**62]}}).encode(), bytes(8)),
        safetensors(json.dumps({"a": ENTRY | {"dtype": "X1"}}).encode(), bytes(8)),
        safetensors(json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(8)),  # two tensors in one place
        safetensors(json.dumps({"a": ENTRY}).encode(), bytes(80)),
        safetensors(json.dumps({"__metadata__": {"format": 7}, "a": ENTRY}).encode(), bytes(8)),
    ],
)
def test_headers_that_lie(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert refused(tmp_path).startswith(f"{tmp_path}/{SINGLE}: ")


numbers = st.integers(-(2**65), 2**65) | st.integers(0, 9) | st.none()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "", "F4"]) | st.none(),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, max_size=3),
    }
)


@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=2000)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entries | numbers),
    data=st.binary(max_size=16),
)
def test_any_header_is_read_or_refused(header: dict[str, object], data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(safetensors(json.dumps(header).encode(), data))
    try:
        with WeightFiles(tmp_path) as files:
            for name in files.shapes():
                files.dtypes()
                files[name][...]
    except UserError as error:
        assert str(error).startswith(str(tmp_path))
