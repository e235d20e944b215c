import json
import random
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from longred_megatron.data import sequences as module
from longred_megatron.data.indexed import IndexedDocuments
from longred_megatron.data.sequences import DocumentSequences, IndexedSequences, SequenceSource, check_tokens
from longred_megatron.errors import UserError

SEQUENCE_LENGTH = 16
DOCUMENT_LENGTHS = [3, 40, 1, 17, 16, 90, 5, 33, 64, 2, 11, 29]


def numbered_documents(lengths, first=0):
    """Documents in which no token comes twice, so that a token tells its document and place."""
    starts = np.cumsum([first, *lengths])
    return [list(range(start, stop)) for start, stop in pairwise(starts.tolist())]


@pytest.fixture
def prefix(tmp_path, write_indexed):
    return write_indexed(tmp_path / "numbered", numbered_documents(DOCUMENT_LENGTHS))


def chained(pieces):
    """The one series in which the last token of each piece is the first of the next."""
    by_first = {piece[0]: piece for piece in pieces}
    assert len(by_first) == len(pieces)
    (first,) = set(by_first) - {piece[-1] for piece in pieces}
    series = [first]
    while series[-1] in by_first:
        series += by_first[series[-1]][1:]
    return series


def test_an_epoch_is_every_piece_of_the_documents_end_to_end_once(prefix):
    sequences = IndexedSequences(prefix, SEQUENCE_LENGTH, (7,))
    num_tokens = sum(DOCUMENT_LENGTHS)
    assert IndexedDocuments(prefix).num_tokens == num_tokens
    assert sequences.pieces_per_epoch == (num_tokens - 1) // SEQUENCE_LENGTH
    documents = {document[0]: document for document in numbered_documents(DOCUMENT_LENGTHS)}
    orders = []
    for epoch in range(3):
        numbers = range(epoch * sequences.pieces_per_epoch, (epoch + 1) * sequences.pieces_per_epoch)
        pieces = [sequences[number].tolist() for number in numbers]
        series = chained(pieces)
        assert len(series) == sequences.pieces_per_epoch * SEQUENCE_LENGTH + 1
        assert [piece[0] for piece in pieces] != series[:-1:SEQUENCE_LENGTH]  # pieces are permuted
        order = []
        while series:  # whole documents one after the other, the last cut off with the tail
            document = documents[series[0]]
            order.append(series[0])
            assert series[: len(document)] == document[: len(series)]
            series = series[len(document) :]
        assert len(set(order)) == len(order)
        assert order != sorted(order)  # documents are permuted
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


@pytest.fixture
def as_large(monkeypatch):
    """The sets of the test have more documents than an order is kept of."""
    monkeypatch.setattr(module, "MOST_STORED", 3)


def test_an_epoch_of_a_large_set_is_every_piece_of_the_file_once(as_large, prefix):
    sequences = IndexedSequences(prefix, SEQUENCE_LENGTH, (7,))
    num_tokens = sum(DOCUMENT_LENGTHS)
    assert sequences.pieces_per_epoch == (num_tokens - 1) // SEQUENCE_LENGTH - 1
    firsts = set()
    for epoch in range(40):
        numbers = range(epoch * sequences.pieces_per_epoch, (epoch + 1) * sequences.pieces_per_epoch)
        pieces = [sequences[number].tolist() for number in numbers]
        series = chained(pieces)
        assert series == list(range(series[0], series[0] + sequences.pieces_per_epoch * SEQUENCE_LENGTH + 1))
        assert [piece[0] for piece in pieces] != series[:-1:SEQUENCE_LENGTH]  # pieces are permuted
        firsts.add(series[0])
    spare = num_tokens - 1 - sequences.pieces_per_epoch * SEQUENCE_LENGTH
    assert min(firsts) < 3 and spare - 3 < max(firsts) <= spare and len(firsts) > 10  # and begin elsewhere each time


def test_the_only_piece_of_a_large_set(as_large, prefix):
    sequences = IndexedSequences(prefix, sum(DOCUMENT_LENGTHS) - 1, (7,))
    assert sequences[0].tolist() == sequences[1].tolist() == list(range(sum(DOCUMENT_LENGTHS)))


def test_a_large_set_makes_no_table(as_large, prefix):
    sequences = DocumentSequences(prefix, SEQUENCE_LENGTH, (7,))
    sequences[5]
    assert "table" not in vars(sequences._sequences._documents)


def test_document_lengths_of_a_large_set(as_large, prefix):
    test_document_lengths_are_those_of_the_tokens_in_every_epoch(prefix, 7)
    test_document_lengths_are_those_of_the_tokens_in_every_epoch(prefix, SEQUENCE_LENGTH)


def test_documents_of_several_sequences_and_empty_ones(tmp_path):
    prefix = str(tmp_path / "parts")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.arange(0, 20), [5, 15])
    builder.add_document(np.arange(0), [])
    builder.add_document(np.arange(20, 50), [10, 10, 10])
    builder.add_document(np.arange(0), [])
    builder.finalize(f"{prefix}.idx")
    sequences = IndexedSequences(prefix, 7, (0,))
    series = chained([sequences[number].tolist() for number in range(7)])
    assert series in ([*range(50)], [*range(20, 50), *range(20)])


def documents_in(tokens):
    """The lengths of the documents that a sample of numbered documents is made of, read off its tokens."""
    of_token = np.searchsorted(np.cumsum(DOCUMENT_LENGTHS), tokens, side="right")
    return tuple(len(list(same)) for _, same in groupby(of_token.tolist()))


@pytest.mark.parametrize("length", [1, 7, SEQUENCE_LENGTH, 100, sum(DOCUMENT_LENGTHS) - 1])
def test_document_lengths_are_those_of_the_tokens_in_every_epoch(prefix, length):
    sequences, plain = DocumentSequences(prefix, length, (7,)), IndexedSequences(prefix, length, (7,))
    assert sequences.prefix == prefix and sequences.padding_fraction() is None
    for number in range(3 * plain.pieces_per_epoch + 1):
        tokens, lengths = sequences[number]
        assert np.array_equal(tokens, plain[number])
        assert sum(lengths) == length + 1 and min(lengths) >= 1
        assert lengths == documents_in(tokens)


def test_a_document_that_ends_with_the_sequence(tmp_path, write_indexed):
    """After s tokens, or with the one more that is only a next token."""
    prefix = write_indexed(tmp_path / "eights", numbered_documents([8] * 6))
    eights, sevens = DocumentSequences(prefix, 8, (3,)), DocumentSequences(prefix, 7, (3,))
    assert [eights[number][1] for number in range(10)] == [(8, 1)] * 10  # two epochs
    # Pieces start at the tokens 0, 7, 14, ... of the epoch.
    assert {sevens[number][1] for number in range(6)} == {(8,), (1, 7), (2, 6), (3, 5), (4, 4), (5, 3)}
    single = write_indexed(tmp_path / "ones", numbered_documents([1] * 30))
    assert DocumentSequences(single, 8, (0,))[2][1] == (1,) * 9


def test_document_lengths_know_documents_of_several_sequences_and_no_empty_ones(tmp_path):
    prefix = str(tmp_path / "parts")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.arange(0, 20), [5, 15])
    builder.add_document(np.arange(0), [])
    builder.add_document(np.arange(20, 50), [10, 10, 10])
    builder.finalize(f"{prefix}.idx")
    sequences = DocumentSequences(prefix, 49, (0,))
    assert {sequences[number][1] for number in range(12)} == {(20, 30), (30, 20)}


def test_samples_do_not_depend_on_access_order(tmp_path, prefix, write_indexed):
    other = write_indexed(tmp_path / "other", numbered_documents([50] * 4, first=10_000))
    blend = {prefix: 0.7, other: 0.3}
    source = SequenceSource(IndexedSequences, blend, SEQUENCE_LENGTH, seed=5)
    expected = [source[index] for index in range(200)]  # several epochs of both
    assert all(sample.dtype == np.int64 and sample.shape == (SEQUENCE_LENGTH + 1,) for sample in expected)
    again = SequenceSource(IndexedSequences, blend, SEQUENCE_LENGTH, seed=5)
    shuffled = random.Random(0).sample(range(200), 200)
    assert all(np.array_equal(again[index], expected[index]) for index in shuffled)
    from_other = [index for index in range(200) if expected[index][0] >= 10_000]
    assert len(from_other) == 60
    # Within a set, the blend takes its samples in the set's own order.
    own = IndexedSequences(other, SEQUENCE_LENGTH, (5, 1))
    assert all(np.array_equal(expected[index], own[k]) for k, index in enumerate(from_other))


def test_seeds_and_places_in_the_blend_give_different_orders(prefix):
    def samples(seed):
        sequences = IndexedSequences(prefix, SEQUENCE_LENGTH, seed)
        return [tuple(sequences[number].tolist()) for number in range(10)]

    assert len({tuple(samples(seed)) for seed in [(0, 0), (1, 0), (0, 1), (2**63 - 1, 0)]}) == 4


def test_order_survives_moving_the_files(tmp_path, prefix):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    before = SequenceSource(IndexedSequences, {prefix: 1.0}, SEQUENCE_LENGTH, seed=3)[2]
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").rename(moved / f"renamed{suffix}")
    after = SequenceSource(IndexedSequences, {str(moved / "renamed"): 1.0}, SEQUENCE_LENGTH, seed=3)[2]
    assert np.array_equal(before, after)


def test_order_is_pinned(prefix):
    """A change here would change the data of runs that resume."""
    source = SequenceSource(IndexedSequences, {prefix: 1.0}, SEQUENCE_LENGTH, seed=2024)
    assert [int(source[index][0]) for index in (0, 1, 2, 100)] == [104, 308, 167, 92]


def test_all_problems_of_a_blend_come_together(tmp_path, prefix):
    absent = str(tmp_path / "absent")
    with pytest.raises(UserError) as raised:
        SequenceSource(IndexedSequences, {prefix: 0.0, absent: 1.0}, 1000, seed=0)
    weight, tokens, missing = raised.value.problems
    assert prefix in weight and "positive" in weight
    assert prefix in tokens and str(sum(DOCUMENT_LENGTHS)) in tokens and "1001" in tokens
    assert f"{absent}.idx" in missing and "prepare_data.py" in missing


def test_one_sequence_needs_exactly_one_token_more(prefix):
    num_tokens = sum(DOCUMENT_LENGTHS)
    assert IndexedSequences(prefix, num_tokens - 1, (0,)).pieces_per_epoch == 1
    with pytest.raises(UserError, match="too few"):
        IndexedSequences(prefix, num_tokens, (0,))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_must_be_positive_numbers(prefix, weight):
    with pytest.raises(UserError, match="positive number"):
        SequenceSource(IndexedSequences, {prefix: weight}, SEQUENCE_LENGTH, seed=0)


def test_an_empty_blend_and_negative_samples_are_errors(prefix):
    with pytest.raises(UserError, match="at least one"):
        SequenceSource(IndexedSequences, {}, SEQUENCE_LENGTH, seed=0)
    with pytest.raises(IndexError):
        SequenceSource(IndexedSequences, {prefix: 1.0}, SEQUENCE_LENGTH, seed=0)[-1]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", [0, 20, -4])
def test_files_cut_short_are_errors(prefix, suffix, size):
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="again"):
        IndexedSequences(prefix, SEQUENCE_LENGTH, (0,))


def test_another_file_under_the_name_is_an_error(prefix):
    Path(f"{prefix}.idx").write_text("something else")
    with pytest.raises(UserError, match="no index of Megatron's"):
        IndexedSequences(prefix, SEQUENCE_LENGTH, (0,))


def test_check_tokens_reads_the_report(tmp_path):
    prefix = str(tmp_path / "set")
    Path(f"{prefix}.json").write_text(json.dumps({"vocab_size": 300}))
    check_tokens(prefix, 300)
    check_tokens(prefix, 320)
    with pytest.raises(UserError, match="vocabulary of 300, but the model has 299"):
        check_tokens(prefix, 299)
    Path(f"{prefix}.json").write_text("[]")
    with pytest.raises(UserError, match="no report of prepare_data"):
        check_tokens(prefix, 299)


def test_check_tokens_looks_through_sets_without_a_report(prefix):
    check_tokens(prefix, sum(DOCUMENT_LENGTHS))
    with pytest.raises(UserError, match=f"the model has {sum(DOCUMENT_LENGTHS) - 1}"):
        check_tokens(prefix, sum(DOCUMENT_LENGTHS) - 1)
