from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longred_megatron.data import packing
from longred_megatron.data.packing import PackedSequences, best_fit
from longred_megatron.errors import UserError

WINDOW = 16


@given(st.lists(st.integers(1, WINDOW)))
def test_each_document_is_in_one_window_and_no_window_overflows(lengths):
    windows = best_fit(lengths, WINDOW)
    assert sorted(place for window in windows for place in window) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in window) <= WINDOW for window in windows)


@given(st.lists(st.integers(1, WINDOW), min_size=1))
def test_no_window_is_opened_that_was_not_needed(lengths):
    """Two windows that would fit into one: the later one's documents had room in the earlier when they came."""
    filled = sorted(sum(lengths[place] for place in window) for window in best_fit(lengths, WINDOW))
    assert len(filled) < 2 or filled[0] + filled[1] > WINDOW


def test_the_tightest_room_is_taken():
    # 9 and 8 open two windows; the 7 fits into both and goes where it leaves nothing; then the 5 and 2 fill the other.
    assert best_fit([9, 8, 7, 5, 2, 1], WINDOW) == [[0, 2], [1, 3, 4, 5]]


@pytest.mark.parametrize("length", [0, WINDOW + 1])
def test_lengths_outside_the_window_are_refused(length):
    with pytest.raises(ValueError, match="between 1 and the window of 16"):
        best_fit([3, length], WINDOW)


@pytest.mark.parametrize("window", [2048, 8192, 131072])
@pytest.mark.parametrize("sigma", [0.8, 1.2])
def test_at_most_2_percent_is_wasted_on_a_log_normal_mix(window, sigma, tmp_path, write_indexed):
    """Lengths as of web pages: median 350 tokens, a long tail that is cut at the window."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(350), sigma, size=20_000).astype(int))
    packed = PackedSequences(write_indexed(tmp_path / "set", [[1] * length for length in lengths]), window, (0,))
    assert 0 <= packed.padding_fraction() <= 0.02
    num_windows = len(epoch(packed))
    assert 1 - lengths.sum() / (num_windows * window) <= 0.02


LENGTHS = [3, 40, 16, 1, 7, 17, 5, 2, 9, 33]
DOCUMENTS = [[100 * number + i for i in range(length)] for number, length in enumerate(LENGTHS, 1)]


@pytest.fixture
def packed(tmp_path, write_indexed, monkeypatch) -> PackedSequences:
    monkeypatch.setattr(packing, "BLOCK_WINDOWS", 3)  # several blocks in an epoch
    return PackedSequences(write_indexed(tmp_path / "set", DOCUMENTS), WINDOW, (7,))


def epoch(packed: PackedSequences, number: int = 0) -> list[packing.Pack]:
    """The windows of an epoch."""
    packed[0]
    first = number * packed._num_blocks
    while len(packed._first_samples) <= first + packed._num_blocks:
        packed[packed._first_samples[-1]]
    return [packed[i] for i in range(packed._first_samples[first], packed._first_samples[first + packed._num_blocks])]


def pieces(packs: list[packing.Pack]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for pack in packs:
        start = 0
        for length in pack.lengths:
            found[tuple(pack.tokens[start : start + length].tolist())] += 1
            start += length
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_epoch_holds_every_document_once_and_whole_unless_it_is_longer_than_a_window(packed, number):
    expected = Counter(
        tuple(document[start : start + WINDOW]) for document in DOCUMENTS for start in range(0, len(document), WINDOW)
    )
    assert pieces(epoch(packed, number)) == expected


@pytest.mark.parametrize("number", [0, 1])
def test_an_epoch_of_a_large_set_holds_the_same_in_runs_from_anywhere(number, packed, monkeypatch):
    expected, stored = pieces(epoch(packed, number)), [pack.tokens.tolist() for pack in epoch(packed, number)]
    monkeypatch.setattr(packing, "MOST_STORED", 3)
    monkeypatch.setattr(packing, "RUNS_PER_BLOCK", 4)
    large = PackedSequences(packed.prefix, WINDOW, (7,))
    assert pieces(epoch(large, number)) == expected
    assert [pack.tokens.tolist() for pack in epoch(large, number)] != stored
    assert "table" not in vars(large._documents)
    runs = [large._order(0).block(place).starts for place in range(large._num_blocks)]
    borders = sum(int((np.diff(starts) < 0).sum()) for starts in runs)
    assert borders > large._num_blocks  # a block goes to and fro in the file


def test_the_rest_of_a_window_is_padding(packed):
    for pack in epoch(packed):
        assert len(pack.tokens) == WINDOW
        assert not pack.tokens[sum(pack.lengths) :].any()


def test_epochs_differ_in_order(packed):
    first, second = ([tuple(pack.tokens) for pack in epoch(packed, number)] for number in (0, 1))
    assert first != second


def test_windows_do_not_depend_on_the_order_of_access(packed, tmp_path):
    other = PackedSequences(str(tmp_path / "set"), WINDOW, (7,))
    expected = {sample: packed[sample].tokens.tolist() for sample in range(40)}
    assert all(other[sample].tokens.tolist() == expected[sample] for sample in (39, 0, 17, 38, 5))


def test_another_seed_gives_another_order(packed, tmp_path):
    other = PackedSequences(str(tmp_path / "set"), WINDOW, (8,))
    assert any(packed[sample].tokens.tolist() != other[sample].tokens.tolist() for sample in range(9))


def test_a_block_without_a_document_is_passed_over(tmp_path, write_indexed, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_WINDOWS", 1)
    packed = PackedSequences(write_indexed(tmp_path / "set", [list(range(1, 101)), [200, 201]]), WINDOW, (1,))
    assert pieces(epoch(packed))[(200, 201)] == 1
    assert sum(len(piece) for piece in pieces(epoch(packed)).elements()) == 102


def test_too_few_tokens_for_a_window_are_an_error(tmp_path, write_indexed):
    with pytest.raises(UserError, match="its 15 tokens do not fill one window of 16"):
        PackedSequences(write_indexed(tmp_path / "set", [[1] * 15]), WINDOW, (0,))


def test_documents_of_one_token_are_all_there(tmp_path, write_indexed, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_WINDOWS", 1)
    packed = PackedSequences(write_indexed(tmp_path / "set", [[i] for i in range(1, 41)]), WINDOW, (1,))
    assert sorted(piece for (piece,) in pieces(epoch(packed)).elements()) == list(range(1, 41))
