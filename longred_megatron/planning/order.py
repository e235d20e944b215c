"""Which objective each micro-batch of an optimizer step trains, and which replica trains it."""

from collections.abc import Mapping, Sequence

from longred_megatron.objectives.base import Needs


def microbatch_order(counts: Mapping[str, int], needs: Mapping[str, Needs]) -> list[str]:
    """The objective of each of the M = sum(counts) micro-batches of one step, over all replicas.

    counts: micro-batches of each objective, by name. The order is by name, whatever that of `counts`, and objectives
    that need the model's head come last: see `last_reach_all`. The step loss does not depend on it:
        (1/M) * sum over micro-batches i of weight(o_i) * (1/N_i) * sum over the N_i valid tokens of loss_o
    (LongReD's Eq. 18, with the mix of objectives as counts of micro-batches).
    """
    names = sorted(counts, key=lambda name: (needs[name].student_head, name))
    return [name for name in names for _ in range(counts[name])]


def last_reach_all(order: Sequence[str], needs: Mapping[str, Needs], num_replicas: int) -> bool:
    """Whether the last micro-batch of every replica reaches every parameter once, as overlapped reduction needs.

    Only those with a head reach the output layer. A value of a layer's attention is computed a second time from the
    layer's input, so that its parameters get two gradients in one micro-batch.
    """
    last = [needs[name] for name in order[-num_replicas:]]
    return all(each.student_head and all(tap.what == "hidden" for tap in each.pairs) for each in last)


def replica_indices(num_microbatches: int, replica: int, num_replicas: int) -> list[int]:
    """Global indices of the micro-batches that one data-parallel replica trains, in training order.

    replica, replica + num_replicas, ...: the objectives of a step are dealt out like cards, so the
    replicas' shares of each differ by at most one.

    Raises ValueError when the micro-batches do not divide evenly among replicas, or there is no such replica.
    """
    if not 0 <= replica < num_replicas:
        raise ValueError(f"replica {replica} is not one of 0 ... {num_replicas - 1}")
    if num_microbatches % num_replicas:
        raise ValueError(
            f"{num_microbatches} micro-batches a step do not divide among {num_replicas} data-parallel "
            f"replicas; make their number a multiple of {num_replicas}"
        )
    return list(range(replica, num_microbatches, num_replicas))


def replica_orders(counts: Mapping[str, int], needs: Mapping[str, Needs], num_replicas: int) -> list[tuple[str, ...]]:
    """The objectives of each replica's micro-batches, as `replica_indices` deals them out; equal shares once."""
    order = microbatch_order(counts, needs)
    shares = (replica_indices(len(order), replica, num_replicas) for replica in range(num_replicas))
    return list(dict.fromkeys(tuple(order[index] for index in share) for share in shares))
