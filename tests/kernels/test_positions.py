import math
from bisect import bisect_left
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longred_megatron.kernels.positions import cream, cyclic, draw, draw_stretch, ends, natural, skip, uniform

NUM_DRAWS = 100_000
SAMPLERS = {"uniform": uniform, "cream": cream}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_length(positions: torch.Tensor, sequence_length: int) -> int:
    """The longest prefix 0, 1, ... that all sequences share."""
    return int((positions == torch.arange(sequence_length)).all(0).long().cumprod(0).sum())


@st.composite
def windows(draw_value):
    sequence_length = draw_value(st.integers(3, 300))
    return sequence_length, draw_value(st.integers(sequence_length, 12 * sequence_length + 5))


@pytest.mark.parametrize("kind", SAMPLERS)
@settings(deadline=None)
@given(windows(), st.integers(1, 8), st.integers(0, 2**31))
def test_positions_are_a_head_a_contiguous_middle_and_a_tail(kind, window, num_sequences, seed):
    length, target = window
    positions = SAMPLERS[kind](num_sequences, length, target, seeded(seed))
    assert positions.shape == (num_sequences, length) and positions.dtype == torch.int64
    assert (positions.diff(dim=1) > 0).all()
    if target == length:
        assert torch.equal(positions, natural(num_sequences, length))
        return

    third, short = length // 3, 4 * (target // length)
    edges = {third, short} if 2 * short < length else {third}
    assert any(
        torch.equal(positions[:, :edge], torch.arange(edge).expand(num_sequences, -1))
        and torch.equal(positions[:, length - edge :], torch.arange(target - edge, target).expand(num_sequences, -1))
        and (positions[:, edge : length - edge].diff(dim=1) == 1).all()
        for edge in edges
    )


@pytest.mark.parametrize("kind", SAMPLERS)
def test_one_coin_for_the_micro_batch_is_fair(kind):
    length, target, num_flips = 60, 240, 2_000  # thirds: 20; 4 * factor: 16
    heads = Counter()
    generator = seeded(0)
    for _ in range(num_flips):
        positions = SAMPLERS[kind](8, length, target, generator)
        tails = (positions.flip(1) == torch.arange(target - 1, target - 1 - length, -1)).all(0)
        heads[int(tails.long().cumprod(0).sum()) >= 20] += 1
    # The short tail of 16 reaches 20 ids only if all 8 middles end next to it, which is rare.
    assert abs(heads[True] - num_flips / 2) < 3 * math.sqrt(num_flips / 4)


def test_natural_positions_count_up():
    assert natural(2, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("factor", [2, 4, 16])
def test_stretch_has_the_published_distribution(factor):
    # P(r <= x < r + 1) of the clipped Gaussian, straight from its distribution function.
    mean, deviation, last = 1 + factor, 5, 2 * factor

    def cdf(x: float) -> float:
        return (1 + math.erf((x - mean) / (deviation * math.sqrt(2)))) / 2

    expected = {r: cdf(r + 1) - (cdf(r) if r > 2 else 0) for r in range(2, last)}
    expected[last] = 1 - cdf(last)
    drawn = Counter(draw_stretch(NUM_DRAWS, factor, seeded(factor)).tolist())
    assert set(drawn) <= set(expected)
    for r, probability in expected.items():
        sigma = math.sqrt(NUM_DRAWS * probability * (1 - probability))
        assert abs(drawn[r] - NUM_DRAWS * probability) < 3 * sigma, r


def test_stretch_at_factor_four_has_the_published_frequencies():
    # The definition with its table, worked out in plain Python on a grid of u.
    xs = [2 + 6 * i / 999 for i in range(1000)]
    cdf = [(1 + math.erf((x - 5) / (5 * math.sqrt(2)))) / 2 for x in xs]
    grid = [(i + 0.5) / 200_000 for i in range(200_000)]

    def stretch(u: float) -> int:
        if u <= cdf[0] or u >= cdf[-1]:
            return 2 if u <= cdf[0] else 8
        i = bisect_left(cdf, u)
        return int(xs[i - 1] + (u - cdf[i - 1]) / (cdf[i] - cdf[i - 1]) * (xs[i] - xs[i - 1]))

    definition = Counter(map(stretch, grid))
    drawn = Counter(draw_stretch(NUM_DRAWS, 4, seeded(1)).tolist())
    for r, published in {2: 0.345, 8: 0.274}.items():
        assert definition[r] / 200_000 == pytest.approx(published, abs=2e-3)
        assert drawn[r] / NUM_DRAWS == pytest.approx(published, abs=5e-3)
    for r in range(3, 8):
        assert 0.07 < definition[r] / 200_000 < 0.08
    for r in range(2, 9):
        probability = definition[r] / 200_000
        sigma = math.sqrt(NUM_DRAWS * probability * (1 - probability))
        assert abs(drawn[r] - NUM_DRAWS * probability) < 3 * sigma, r


def middle_ends(kind: str, length: int, target: int, seed: int) -> tuple[torch.Tensor, int]:
    """The middle's last id of each of NUM_DRAWS sequences, and the length of head and tail."""
    positions = SAMPLERS[kind](NUM_DRAWS, length, target, seeded(seed))
    edge = head_length(positions, length)
    return positions[:, length - edge - 1], edge


def assert_uniform(values: torch.Tensor, first: int, last: int) -> None:
    """All of first..last occur, nothing else, and chi-square is less than 3 sigma above its mean."""
    counts = torch.bincount(values - first, minlength=last - first + 1).double()
    assert len(counts) == last - first + 1 and values.min() == first and values.max() == last
    expected = len(values) / len(counts)
    degrees = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 3 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("target", [120, 127])
def test_uniform_ends_are_uniform_over_the_whole_range_with_both_ends(target, seed):
    ends, edge = middle_ends("uniform", 30, target, seed)
    assert edge in (10, 12 if target < 120 else 16)
    assert_uniform(ends, 30 - edge, target - edge - 1)


@pytest.mark.parametrize("seed", range(4))
def test_cream_ends_are_uniform_over_the_range_of_their_stretch(seed, monkeypatch):
    # The stretch held at an odd r, and an odd T: r/2 * T is not an integer, and rounds down.
    r, length = 5, 35
    monkeypatch.setattr(
        "longred_megatron.kernels.positions.draw_stretch", lambda n, factor, generator: torch.full((n,), r)
    )
    ends, edge = middle_ends("cream", length, 4 * length, seed)
    chunk = length - 2 * edge
    assert_uniform(ends, edge + (chunk - 1) * r // 2, r * length // 2 - edge - 1)


def test_cream_ends_follow_the_published_bounds_when_all_stretches_are_drawn():
    # Even T: the published bounds [int(head + (len_chunk - 1) * r/2), r/2 * T - tail - 1] as they stand.
    length, target = 90, 360
    ends, edge = middle_ends("cream", length, target, 5)
    chunk = length - 2 * edge
    stretches = draw_stretch(NUM_DRAWS, 4, seeded(6)).double()
    low, high = (edge + (chunk - 1) * stretches / 2).floor(), stretches / 2 * length - edge - 1
    mean, variance = ((low + high) / 2).mean(), ((high - low + 1) ** 2 / 12 + ((low + high) / 2) ** 2).mean()
    sigma = ((variance - mean**2) * 2 / NUM_DRAWS).sqrt()  # of the difference of two such means
    assert abs(ends.double().mean() - mean) < 3 * sigma
    assert ends.min() == edge + chunk - 1 and ends.max() <= target - edge - 1


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_generator_alone_decides(kind):
    first = draw(kind, 4, 64, 256, seeded(7))
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(draw(kind, 4, 64, 256, seeded(7)), first)
    assert not torch.equal(draw(kind, 4, 64, 256, seeded(8)), first)
    assert len({tuple(row) for row in first.tolist()}) > 1  # drawn per sequence


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for kind in ("natural", "uniform", "cream"):
        draw(kind, 2, 64, 256, seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_chooses_the_sampler():
    assert torch.equal(draw("natural", 2, 8, 32, seeded(0)), natural(2, 8))
    assert torch.equal(draw("uniform", 2, 64, 256, seeded(3)), uniform(2, 64, 256, seeded(3)))
    assert torch.equal(draw("cream", 2, 64, 256, seeded(3)), cream(2, 64, 256, seeded(3)))
    with pytest.raises(ValueError, match="'skipped' are not known; choose one of natural, uniform, cream"):
        draw("skipped", 2, 8, 32, seeded(0))


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("length, target, message", [(2, 8, "at least 3 tokens"), (8, 7, "shorter than")])
def test_windows_without_room_are_refused(kind, length, target, message):
    with pytest.raises(ValueError, match=message):
        draw(kind, 1, length, target, seeded(0))


# Perturbed positions (arXiv 2604.14339)


def perturbed(variant: str, num_sequences: int, length: int, longest: int, seed: int) -> tuple[torch.Tensor, ...]:
    if variant == "skip":
        return skip(num_sequences, length, longest, seeded(seed))
    return cyclic(num_sequences, length, seeded(seed))


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 500), st.integers(1, 20), st.integers(0, 2**31))
def test_skipped_ids_are_natural_before_s_and_y_further_from_s_on(length, longest, num_sequences, seed):
    ids, start = skip(num_sequences, length, longest, seeded(seed))
    assert ids.shape == (num_sequences, length) and ids.dtype == torch.int64
    assert start.shape == (num_sequences,)
    for row, s in zip(ids.tolist(), start.tolist(), strict=True):
        assert 0 <= s <= length - 1
        y = row[s] - s
        assert 1 <= y <= longest
        assert row == [i if i < s else i + y for i in range(length)]


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 20), st.integers(0, 2**31))
def test_cyclic_ids_are_shifted_modulo_the_length(length, num_sequences, seed):
    ids, start = cyclic(num_sequences, length, seeded(seed))
    assert ids.shape == (num_sequences, length) and ids.dtype == torch.int64
    assert start.shape == (num_sequences,)
    for row, s in zip(ids.tolist(), start.tolist(), strict=True):
        u = row[0]
        assert 1 <= u <= length - 1  # 0 would change nothing
        assert row == [(i + u) % length for i in range(length)]
        assert row[s] == 0


@pytest.mark.parametrize("variant", ["skip", "cyclic"])
@pytest.mark.parametrize("length", [2, 3, 16, 65])
def test_the_start_is_the_first_token_that_sees_changed_distances(variant, length):
    """Distances of every pair of a token and one before it, against natural ones."""
    ids, start = perturbed(variant, 300, length, 7, seed=length)
    distances = ids[:, :, None] - ids[:, None, :]
    places = torch.arange(length)
    before = places[:, None] > places[None, :]
    changed = ((distances != places[:, None] - places[None, :]) & before).any(2)  # [sequences, tokens]
    for row, s in zip(changed.tolist(), start.tolist(), strict=True):
        # A jump at the first token moves them all together: the paper draws s = 0, and nothing changes.
        assert row == [i >= s > 0 for i in range(length)]
    assert (start == 0).any() == (variant == "skip")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("length", "longest"), [(40, 40), (40, 7), (16, 100)])
def test_the_skips_place_and_length_are_uniform_with_both_ends(length, longest, seed):
    ids, start = skip(NUM_DRAWS, length, longest, seeded(seed))
    distance = ids[:, -1] - (length - 1)
    assert_uniform(start, 0, length - 1)
    assert_uniform(distance, 1, longest)
    assert_uniform(start * longest + distance, 1, length * longest)  # and independent of each other


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [3, 64, 255])
def test_cyclic_shifts_are_uniform_with_both_ends(length, seed):
    ids, start = cyclic(NUM_DRAWS, length, seeded(seed))
    assert_uniform(ids[:, 0], 1, length - 1)
    assert torch.equal(start, length - ids[:, 0])


@pytest.mark.parametrize("variant", ["skip", "cyclic"])
def test_perturbations_are_drawn_for_each_sequence_by_the_generator_alone(variant):
    before = torch.get_rng_state()
    first = perturbed(variant, 8, 64, 64, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    for again, mine in zip(perturbed(variant, 8, 64, 64, seed=7), first, strict=True):
        assert torch.equal(again, mine)
    assert not torch.equal(perturbed(variant, 8, 64, 64, seed=8)[0], first[0])
    assert len(set(first[1].tolist())) > 1


def test_ends_are_the_places_of_last_tokens():
    assert ends([3, 1, 4]) == [2, 3, 7]
    assert ends([5]) == [4] and ends([]) == []
