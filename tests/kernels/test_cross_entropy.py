from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longred_megatron.kernels.cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 11, 6, 13
SCALE = 0.37  # of the loss, as the caller's divisor and weight


def inputs(
    dtype: torch.dtype, rows: int = VOCAB, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(rows, HIDDEN, dtype=torch.float64, generator=generator)
    weight[VOCAB:] = 100  # padding that would take all the probability
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[::4] = -100
    labels[1], labels[2] = 0, VOCAB - 1
    labels[3], labels[5] = 7, 8  # the first rows of the second rank's shard, below
    return hidden.to(dtype), weight.to(dtype), labels


def reference(hidden, weight, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = cross_entropy(hidden @ weight[:VOCAB].t(), labels, reduction="sum", ignore_index=-100)
    (SCALE * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("chunk_tokens", [*range(1, TOKENS + 1), 1024])
def test_loss_and_gradients_equal_torch(dtype, tolerance, chunk_tokens, rows):
    hidden, weight, labels = inputs(dtype, rows)
    expected = reference(hidden, weight, labels)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=chunk_tokens)
    (SCALE * loss).backward()
    assert loss.dtype == dtype and loss.shape == ()
    for actual, wanted in zip((loss.detach(), hidden.grad, weight.grad), expected, strict=True):
        assert relative_error(actual, wanted) < tolerance
    assert not hidden.grad[labels == -100].any() and not weight.grad[VOCAB:].any()


def test_bf16_has_an_fp32_softmax_and_returns_bf16_gradients():
    hidden, weight, labels = inputs(torch.bfloat16, rows=VOCAB + 3, tokens=512)
    # The logits round to bf16 once; from there on sums are fp32, or 512 chunks would be off by far more.
    logits = (hidden @ weight.t())[:, :VOCAB].float()
    expected_loss = cross_entropy(logits, labels, reduction="sum")
    _, expected_hidden, expected_weight = reference(hidden, weight, labels)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=1)
    (SCALE * loss).backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-6, atol=0)
    assert relative_error(hidden.grad, expected_hidden) < 0.005
    assert relative_error(weight.grad, expected_weight) < 0.005


def test_large_logits_stay_finite():
    hidden, weight, labels = inputs(torch.float32)
    expected, _, _ = reference(1000 * hidden, weight, labels)
    loss = linear_cross_entropy(1000 * hidden, weight, labels, vocab_size=VOCAB)
    assert relative_error(loss, expected) < 1e-5


def test_no_label_at_all_gives_zero_loss_and_zero_gradients():
    hidden, weight, labels = inputs(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), vocab_size=VOCAB, chunk_tokens=4)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("label", [VOCAB, VOCAB + 2, VOCAB + 50, -1])
def test_a_label_outside_the_vocabulary_cannot_go_unnoticed(label):
    hidden, weight, labels = inputs(torch.float32, rows=VOCAB + 3)
    labels[5] = label
    assert linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB).isposinf()


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)


class Recorder(TorchDispatchMode):
    """The sizes of all tensors made, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes |= {leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self.num_products += func in PRODUCTS
        return result


@pytest.mark.parametrize("needs_hidden, needs_weight", [(True, True), (True, False), (False, True), (False, False)])
def test_logits_exist_for_one_chunk_only_and_are_made_once(needs_hidden, needs_weight):
    tokens, vocab, chunk = 512, 400, 32  # larger than any other tensor: [512, 400] against [400, 6], [512, 6]
    hidden = torch.randn(tokens, HIDDEN, requires_grad=needs_hidden)
    weight = torch.randn(vocab, HIDDEN, requires_grad=needs_weight)
    labels = torch.randint(vocab, (tokens,))
    with Recorder() as recorder:
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=vocab, chunk_tokens=chunk)
        if loss.requires_grad:
            loss.backward()
    assert max(recorder.sizes) == chunk * vocab
    assert recorder.num_products == (1 + needs_hidden + needs_weight) * tokens // chunk
    assert (hidden.grad is not None, weight.grad is not None) == (needs_hidden, needs_weight)


def test_under_no_grad_only_the_loss_is_computed():
    hidden, weight, labels = inputs(torch.float64)
    expected, _, _ = reference(hidden, weight, labels)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad(), Recorder() as recorder:
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=TOKENS)
    assert not loss.requires_grad and recorder.num_products == 1
    assert relative_error(loss, expected) < 1e-13


def test_a_second_backward_pass_is_refused():
    hidden, weight, labels = inputs(torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, vocab_size=VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_too_few_rows_are_refused():
    hidden, weight, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match="vocab_size 14 exceeds the 1 x 13 rows"):
        linear_cross_entropy(hidden, weight, labels, vocab_size=14)


def run_rank(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    results = {}
    # 13 entries on two ranks, with 1 row of padding, with 3, and with a second rank of nothing but padding.
    for local_rows in (7, 8, 16):
        hidden, weight, labels = inputs(torch.float32, rows=local_rows * num_ranks)
        shard = weight[rank * local_rows : (rank + 1) * local_rows].clone().requires_grad_()
        hidden.requires_grad_()
        loss = linear_cross_entropy(hidden, shard, labels, vocab_size=VOCAB, group=dist.group.WORLD, chunk_tokens=4)
        (SCALE * loss).backward()
        results[local_rows] = (loss.detach(), hidden.grad, shard.grad)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_a_shard_each_equal_one_process(tmp_path):
    mp.spawn(run_rank, args=(2, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for local_rows in ranks[0]:
        hidden, weight, labels = inputs(torch.float32, rows=2 * local_rows)
        expected_loss, expected_hidden, expected_weight = reference(hidden, weight, labels)
        losses, hidden_parts, weight_parts = zip(*(results[local_rows] for results in ranks), strict=True)
        assert torch.equal(*losses)
        assert relative_error(losses[0], expected_loss) < 1e-6
        # Each rank's hidden gradient is a partial sum: the caller reduces it over the group.
        assert relative_error(sum(hidden_parts), expected_hidden) < 1e-6
        assert relative_error(torch.cat(weight_parts), expected_weight) < 1e-6
