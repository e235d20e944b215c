from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longred_megatron.objectives.base import Needs, Tap
from longred_megatron.planning.order import last_reach_all, microbatch_order, replica_indices

WITHOUT_HEAD = Needs(pairs={Tap(1): Tap(1)})
NEEDS = {
    "short_restoration": WITHOUT_HEAD,
    "short_to_long": WITHOUT_HEAD,
    "long_text": Needs(student_head=True),
    "another": Needs(student_head=True, teacher_head=True),
}

counts_of_a_step = st.dictionaries(st.sampled_from(list(NEEDS)), st.integers(0, 20)).filter(
    lambda counts: sum(counts.values()) > 0
)


@settings(deadline=None)
@given(counts_of_a_step)
def test_order_has_each_objective_as_often_as_asked(counts):
    order = microbatch_order(counts, NEEDS)
    assert Counter(order) == {name: count for name, count in counts.items() if count}


@settings(deadline=None)
@given(counts_of_a_step)
def test_those_with_a_head_come_last_and_the_order_of_the_counts_does_not_matter(counts):
    order = microbatch_order(counts, NEEDS)
    heads = [NEEDS[name].student_head for name in order]
    assert heads == sorted(heads)
    assert microbatch_order(dict(reversed(counts.items())), NEEDS) == order


def test_gradients_may_be_reduced_early_only_behind_what_reaches_every_parameter_once():
    order = ["short_restoration", "long_text", "long_text"]
    assert last_reach_all(order, NEEDS, 1) and last_reach_all(order, NEEDS, 2)
    assert not last_reach_all(order, NEEDS, 3)
    twice = NEEDS | {"long_text": Needs(student_head=True, pairs={Tap(1, "query"): Tap(1, "query")})}
    assert not last_reach_all(order, twice, 1)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 16))
def test_every_replica_gets_its_share_and_none_is_lost(share, num_replicas):
    shares = [replica_indices(share * num_replicas, replica, num_replicas) for replica in range(num_replicas)]
    assert all(len(indices) == share and indices == sorted(indices) for indices in shares)
    assert sorted(index for indices in shares for index in indices) == list(range(share * num_replicas))


@settings(deadline=None)
@given(counts_of_a_step, st.integers(1, 8))
def test_replicas_shares_of_an_objective_differ_by_at_most_one(counts, num_replicas):
    order = microbatch_order(counts, NEEDS)
    if len(order) % num_replicas:
        return
    for objective in NEEDS:
        shares = [
            sum(order[index] == objective for index in replica_indices(len(order), replica, num_replicas))
            for replica in range(num_replicas)
        ]
        assert max(shares) - min(shares) <= 1


def test_the_released_step_on_four_replicas():
    order = microbatch_order({"long_text": 8, "short_to_long": 2, "short_restoration": 6}, NEEDS)
    assert replica_indices(16, 1, 4) == [1, 5, 9, 13]
    assert [order[index] for index in (1, 5, 9, 13)] == ["short_restoration"] * 2 + ["long_text"] * 2


@pytest.mark.parametrize("num_microbatches, num_replicas", [(16, 3), (1, 2), (7, 4)])
def test_counts_that_do_not_divide_among_replicas_are_refused(num_microbatches, num_replicas):
    with pytest.raises(ValueError, match=f"{num_microbatches} micro-batches .* {num_replicas} data-parallel"):
        replica_indices(num_microbatches, 0, num_replicas)


@pytest.mark.parametrize("replica", [-1, 2])
def test_a_replica_that_does_not_exist_is_refused(replica):
    with pytest.raises(ValueError, match=f"replica {replica}"):
        replica_indices(4, replica, 2)
