"""What a layer's operations hold: for the backward pass, and while they run.

One list of operations per implementation of a layer; kept bytes and both peaks follow from it (`Cost`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from longred_megatron.families import Architecture


class Operation(NamedTuple):
    """Bytes on one rank.

    kept: made in the forward pass and held until the backward pass is through. output: the gradient of its output has
    as many. forward, backward: held beside these while it runs. part: of the layer, as in `families.weights.Part`.
    """

    part: str
    kept: float
    output: float
    forward: float = 0.0
    backward: float = 0.0


class Cost(NamedTuple):
    """Of operations that run one after another. Bytes.

    kept: at the end of the forward pass. forward: the most while it runs. backward: the most while the backward pass
    runs, with what is kept.
    """

    kept: float
    forward: float
    backward: float


def cost(operations: Sequence[Operation], held: float = 0.0) -> Cost:
    """held: bytes of a gradient that waits for the end of the backward pass, as a skip connection's does."""
    kept, forward, backward, below = 0.0, 0.0, 0.0, 0.0
    for each in operations:
        kept += each.kept
        forward = max(forward, kept + each.output + each.forward)
        backward = max(backward, kept + held + each.output + below + each.backward)
        below = each.output
    return Cost(kept, forward, backward)


def recomputed(operations: Sequence[Operation], state: float, recompute: str) -> Cost:
    """One layer. state: bytes of its input, which the first norm keeps, and of an output.

    What was computed again is handed to the backward pass, which has its output until it is through.
    """
    whole = cost(operations, held=state)
    if recompute == "full":
        return Cost(state, state + without_graph(operations), whole.backward + state)
    if recompute == "selective":
        kept = sum(op.kept for op in operations if op.part != "mlp")
        mlp = [op for op in operations if op.part == "mlp"]
        return Cost(
            kept,
            kept + without_graph(mlp),
            max(kept + cost(mlp, held=state).backward + state, whole.backward - sum(op.kept for op in mlp)),
        )
    return whole


def without_graph(operations: Sequence[Operation]) -> float:
    """The most while they run and nothing is kept: an operation's input, its own, its output."""
    most, below = 0.0, 0.0
    for each in operations:
        most = max(most, below + max(each.kept, each.output) + each.forward)
        below = each.output
    return most


@dataclass(frozen=True)
class Tokens:
    """Of one micro-batch on one rank.

    all: of the context rank. own: whose hidden states it holds (under sequence parallelism, its tensor rank's part).
    keys: that its queries' sequences have, of all of them. mask_bytes: of attention masks that are tensors.
    """

    all: float
    own: float
    keys: float
    mask_bytes: float = 0.0


@dataclass(frozen=True)
class Widths:
    """Of one tensor rank's part of a layer, in elements of a token. hidden: of all ranks."""

    hidden: int
    query: float
    kv: float
    ffn: float
    heads: float
    head_dim: int
    qk_norm: bool

    @classmethod
    def of(cls, model: Architecture, tensor: int) -> Self:
        """One of `tensor` ranks."""
        return cls(
            hidden=model.hidden_size,
            query=model.num_attention_heads * model.head_dim / tensor,
            kv=model.num_kv_heads * model.head_dim / tensor,
            ffn=model.intermediate_size / tensor,
            heads=model.num_attention_heads / tensor,
            head_dim=model.head_dim,
            qk_norm=model.qk_norm,
        )


class Numbers(NamedTuple):
    """Bytes of a number of one tensor. input: as a matrix product keeps what enters it. copy: of a second one that it
    keeps of attention's output. taken, given: as attention keeps queries, keys and values, and its output."""

    size: int
    input: float
    copy: float
    taken: float
    given: float


LayerOperations = Callable[[Widths, Tokens, Numbers], list[Operation]]


@dataclass(frozen=True)
class Implementation:
    """Whose operations run: torch's on a CPU, or Transformer Engine's on a GPU.

    layer: one layer's operations. inputs_moved: whether a step's micro-batches are copied to the device, int64.
    optimizer_copies: fp32 tensors of the size of the largest parameter's share, while the optimizer's step runs.
    """

    layer: LayerOperations
    norm: Callable[[float, float, int], Operation]
    inputs_moved: bool
    optimizer_copies: int


def plain_layer(w: Widths, t: Tokens, numbers: Numbers) -> list[Operation]:
    """A layer of Megatron's local specification with `model.plain_layers` and torch's scaled_dot_product_attention.

    Attention computes in fp32, of copies where the numbers are 16-bit. What is kept is what the operations save for
    their backward passes. There is no FP8.
    """
    size = numbers.size
    copies = size < 4
    qkv = w.query + 2 * w.kv

    def weight_gradient(rows: float, columns: float) -> float:
        return size * rows * columns  # a micro-batch's, before it is added to the sum of all

    norm = plain_norm(w.hidden, t.own, size)
    # The norms of heads keep a copy of the queries, and the keys as a part of what both were cut from.
    head_norm = Operation("attention", t.all * size * (w.query + qkv), t.all * size * qkv)
    is_cut = t.keys > t.all or t.mask_bytes > 0  # over context ranks
    if is_cut:  # keys and values are those of all spans, copied
        keys = 2 * t.keys * w.kv * (4 if copies else size) + t.mask_bytes
        attention_kept = t.all * (4 * w.query) + keys
    else:
        attention_kept = t.all * 4 * qkv
    attention_kept += t.all * (4 * w.query + 4 * w.heads)
    return [
        norm,
        Operation("attention", 0, t.all * size * qkv, backward=weight_gradient(qkv, w.hidden)),
        *([head_norm] if w.qk_norm else []),
        Operation(
            "attention",
            attention_kept,
            t.all * size * w.query,
            backward=t.all * 4 * (qkv + w.query) + (t.all * 4 * w.query if copies else 0),
        ),
        Operation(
            "attention",
            t.all * size * w.query if copies or is_cut else 0.0,  # else it takes attention's output itself
            t.all * size * w.hidden,
            backward=weight_gradient(w.hidden, w.query),
        ),
        norm,
        Operation(
            "mlp", t.all * size * 2 * w.ffn, t.all * size * 2 * w.ffn, backward=weight_gradient(2 * w.ffn, w.hidden)
        ),
        Operation("mlp", 0, t.all * size * w.ffn, backward=t.all * size * 2 * w.ffn),
        Operation("mlp", t.all * size * w.ffn, t.all * size * w.hidden, backward=weight_gradient(w.hidden, w.ffn)),
    ]


def plain_norm(width: float, tokens: float, size: int) -> Operation:
    """Keeps its input, its output, and an fp32 number a token. What it computes with is fp32."""
    copies = 4 * width if size < 4 else 0
    kept = tokens * (2 * size * width + 4)
    return Operation("norm", kept, tokens * size * width, tokens * copies, tokens * (4 * width + copies))


def fused_layer(w: Widths, t: Tokens, numbers: Numbers) -> list[Operation]:
    """A layer of Megatron's Transformer Engine specification, on a GPU.

    A norm is a part of the product after it, which keeps the norm's input, its output, and an fp32 number a token.
    Attention keeps queries, keys, values, its output, and an fp32 number for each head; it sees no mask. The gate's
    fused activation keeps what it takes. Products add weight gradients to the sum of all micro-batches themselves
    (apex). What is kept is byte for byte what Transformer Engine 2.20's Python saves (`tests/gpu_path/test_kept.py`);
    on a GPU nothing was measured.
    """
    size = numbers.size
    qkv = w.query + 2 * w.kv
    gathered = size * t.all * w.hidden if t.own < t.all else 0.0  # tokens of all tensor ranks
    # The ring of context ranks: the next keys and values, and each step's part of the output.
    ring = size * t.all * (4 * w.kv + 2 * w.query) if t.keys > t.all else 0.0
    norm = fused_norm(w.hidden, t.own, size, numbers.input)
    # Their output, too: Transformer Engine's Python keeps none, but Megatron's run with such norms on H100 held it.
    heads = [] if not w.qk_norm else [fused_norm(w.query + w.kv, t.all, size)._replace(part="attention")]
    attention = t.all * (numbers.taken * qkv + numbers.given * w.query + 4 * w.heads)
    copy = t.all * numbers.copy * w.query
    return [
        norm,
        Operation("attention", 0, t.all * size * qkv, gathered, 2 * gathered),
        *heads,
        Operation("attention", attention, t.all * size * w.query, ring, t.all * size * qkv + 2 * ring),
        Operation("attention", copy, t.own * size * w.hidden, gathered, gathered),
        norm,
        Operation("mlp", t.all * size * 2 * w.ffn, t.all * size * 2 * w.ffn, gathered, 2 * gathered),
        Operation("mlp", 0, t.all * size * w.ffn),
        Operation("mlp", t.all * numbers.input * w.ffn, t.own * size * w.hidden, gathered, gathered),
    ]


def fused_norm(width: float, tokens: float, size: int, output: float | None = None) -> Operation:
    """Keeps its input, its output, and an fp32 number a token. output: bytes kept of its output's number."""
    kept = tokens * ((size + (size if output is None else output)) * width + 4)
    return Operation("norm", kept, tokens * size * width, backward=tokens * size * width)


PLAIN = Implementation(
    layer=plain_layer,
    norm=plain_norm,
    inputs_moved=False,
    optimizer_copies=2,
)

FUSED = Implementation(
    layer=fused_layer,
    norm=fused_norm,
    inputs_moved=True,
    optimizer_copies=0,
)
