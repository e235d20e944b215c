"""Which objective each micro-batch of an optimizer step trains, and which replica trains it."""

from collections.abc import Mapping

# What a loss compares: hidden states of layers, or next-token distributions.
HIDDEN_STATE_OBJECTIVES = ("short_restoration", "short_to_long")
TOKEN_OBJECTIVES = ("packed_distillation", "long_text")
# Those of tokens last: with overlapped gradient reduction the last micro-batch has to touch every parameter, and only
# they reach the output layer.
OBJECTIVES = HIDDEN_STATE_OBJECTIVES + TOKEN_OBJECTIVES


def microbatch_order(counts: Mapping[str, int]) -> list[str]:
    """The objective of each of the M = sum(counts) micro-batches of one step, over all replicas.

    The order is that of `OBJECTIVES`, whatever the order of `counts`. The step loss does not depend on it:
        (1/M) * sum over micro-batches i of weight(o_i) * (1/N_i) * sum over the N_i valid tokens of loss_o
    (LongReD's Eq. 18, with the mix of objectives as counts of micro-batches).

    Raises ValueError for an unknown objective, a negative count, or no micro-batch at all.
    """
    for objective, count in counts.items():
        if objective not in OBJECTIVES:
            raise ValueError(f"objective {objective!r} is not known; choose among {', '.join(OBJECTIVES)}")
        if count < 0:
            raise ValueError(f"objective {objective!r} has {count} micro-batches; give 0 or more")
    order = [objective for objective in OBJECTIVES for _ in range(counts.get(objective, 0))]
    if not order:
        raise ValueError("a step needs at least one micro-batch; every objective has 0")
    return order


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
