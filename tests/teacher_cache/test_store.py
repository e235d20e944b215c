"""Files of the cache: exact or rounded as said, read by rows, and recognised where they are damaged."""

from pathlib import Path

import pytest
import torch

from longred_megatron.teacher_cache.store import BLOCK, TargetStore

KEY, OTHER = "ab" * 32, "cd" * 32
LENGTH = 2 * BLOCK + 7


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (100 * torch.randn(LENGTH, *shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("shape", [(24,), (3, 8)])
def test_any_rows_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    store, value = TargetStore(tmp_path, "exact"), values(dtype, *shape)
    store.write(KEY, value)
    for start, stop in ((0, LENGTH), (0, 1), (5, BLOCK), (BLOCK - 1, BLOCK + 1), (BLOCK, LENGTH), (LENGTH - 1, LENGTH)):
        read = store.read(KEY, start, stop)
        assert read is not None and read.dtype == dtype and torch.equal(read, value[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_is_within_its_own_precision_and_reads_as_it_said(dtype: torch.dtype, tmp_path: Path) -> None:
    store, value = TargetStore(tmp_path, "fp8"), values(dtype, 3, 8)
    value[4] *= 1e-3  # a token of another size has a scale of its own
    value[5] = 0
    store.write(KEY, value)
    read = store.read(KEY, 2, LENGTH)
    assert read is not None and read.dtype == dtype and torch.equal(read, store.rounded(value)[2:])
    largest = value.float().abs().amax(-1, keepdim=True)
    error = (store.rounded(value).float() - value.float()).abs()
    assert (error <= value.float().abs() * 2**-4 + largest * 2**-9).all()  # 3 bits of mantissa; 2^-10 of 448 below
    exact = TargetStore(tmp_path / "exact", "exact")
    exact.write(KEY, value)
    assert store.path(KEY).stat().st_size < exact.path(KEY).stat().st_size
    entries = values(torch.int32, 5)
    store.write(OTHER, entries)  # numbers of entries are not rounded
    assert torch.equal(store.read(OTHER, 0, LENGTH), entries)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert TargetStore(tmp_path / "none", "exact").read(KEY, 0, 1) is None


@pytest.mark.parametrize("number_format", ["exact", "fp8"])
def test_every_flipped_byte_is_seen(number_format: str, tmp_path: Path) -> None:
    store = TargetStore(tmp_path, number_format)
    value = torch.linspace(-3, 3, 40).reshape(10, 4)
    store.write(KEY, value)
    path, expected = store.path(KEY), store.rounded(value)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        read = store.read(KEY, 0, 10)
        assert read is None or torch.equal(read, expected), place  # the header has spaces that say nothing
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.read(KEY, 0, 10) is None
    store.write(KEY, value)
    assert torch.equal(store.read(KEY, 0, 10), expected)


def test_another_ones_file_is_not_taken_and_made_anew(tmp_path: Path) -> None:
    store, value = TargetStore(tmp_path, "exact"), values(torch.float32, 4)
    store.write(OTHER, value + 1)
    store.path(KEY).parent.mkdir()
    store.path(OTHER).rename(store.path(KEY))
    assert store.read(KEY, 0, 1) is None
    store.write(KEY, value)
    assert torch.equal(store.read(KEY, 0, LENGTH), value)


def test_what_is_there_and_whole_is_left_alone(tmp_path: Path) -> None:
    store, value = TargetStore(tmp_path, "exact"), values(torch.float32, 4)
    store.write(KEY, value)
    before = store.path(KEY).stat().st_mtime_ns
    store.write(KEY, value)
    assert store.path(KEY).stat().st_mtime_ns == before
