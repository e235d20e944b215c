"""The output layer's weight gradient: in fp32, and once, into Megatron's sum of all micro-batches."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longred_megatron.kernels import linear_loss as kernel
from longred_megatron.kernels.cross_entropy import linear_cross_entropy

TOKENS, VOCAB, HIDDEN = 96, 50, 16


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Two micro-batches of hidden states and labels, and a weight."""
    torch.manual_seed(1)
    hidden = [torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_() for _ in range(2)]
    weight = torch.randn(VOCAB, HIDDEN).to(dtype).requires_grad_()
    return hidden, weight, [torch.randint(VOCAB, (TOKENS,)) for _ in range(2)]


def expected(hidden: list[Tensor], weight: Tensor, labels: list[Tensor]) -> Tensor:
    """The gradient of 1/3 of the losses' sum, in fp64."""
    exact = weight.detach().double().requires_grad_()
    for states, ids in zip(hidden, labels, strict=True):
        torch.nn.functional.cross_entropy(states.detach().double() @ exact.t(), ids, reduction="sum").div(3).backward()
    assert exact.grad is not None
    return exact.grad


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_added_to_megatrons_sum_in_fp32(tied: bool, dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(VOCAB, HIDDEN), False  # type: ignore[attr-defined]
    if tied:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    for states, ids in zip(hidden, labels, strict=True):
        (linear_cross_entropy(states, weight, ids, vocab_size=VOCAB, chunk_tokens=32) / 3).backward()
        assert weight.grad is not None and weight.grad.shape == weight.shape  # starts the bucket's reduction
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert not tied or not weight.grad.any()  # Megatron adds it to the sum, after the embedding's was is there
        total: Tensor = weight.main_grad  # type: ignore[attr-defined]
        assert not torch.equal(total, total.bfloat16().float())  # not even the first is rounded to the weight's digits
        weight.grad = None
    assert error(total, expected(hidden, weight, labels)) < (5e-3 if dtype is torch.bfloat16 else 1e-6)


def test_without_megatron_autograd_gets_it() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    for states, ids in zip(hidden, labels, strict=True):
        (linear_cross_entropy(states, weight, ids, vocab_size=VOCAB, chunk_tokens=32) / 3).backward()
    assert weight.grad is not None and error(weight.grad, expected(hidden, weight, labels)) < 5e-3


@pytest.mark.parametrize(("rows", "tokens"), [(50, 96), (1 << 20, 64), (1 << 27, 1)])
def test_a_chunk_is_counted_in_bytes(rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []

    def loss(logits: Tensor, chunk: slice, _: bool) -> tuple[Tensor, Tensor]:
        chunks.append(logits.shape[0])
        return torch.zeros(()), logits

    with torch.device("meta"):
        hidden, weight = torch.zeros(TOKENS, 1), torch.zeros(rows, 1)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype=None, device=None: torch.empty((), device="meta"))
    kernel.linear_loss(hidden, weight, loss)
    assert chunks[0] == tokens and sum(chunks) == TOKENS


class OnGpu(Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def test_apex_adds_to_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its kernel, which adds and takes tokens first: the sum begins at zero, and chunks add up."""

    def add_product(hidden: Tensor, grad_logits: Tensor, total: Tensor) -> None:
        total.addmm_(grad_logits.float().t(), hidden.float())

    monkeypatch.setattr(kernel, "_add_product_of_apex", add_product)
    total = torch.full((VOCAB, HIDDEN), torch.nan)
    gradients = [torch.randn(TOKENS, VOCAB).bfloat16() for _ in range(2)]
    states = [torch.randn(TOKENS, HIDDEN).bfloat16().as_subclass(OnGpu) for _ in range(2)]
    for i in range(2):
        kernel._add_product(total, gradients[i], states[i], is_first=i == 0)
    wanted = sum(g.double().t() @ x.as_subclass(Tensor).double() for g, x in zip(gradients, states, strict=True))
    assert isinstance(wanted, Tensor) and error(total, wanted) < 1e-5


def test_torch_takes_the_product_that_a_gpu_without_apex_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its rules alone: a product of bf16 factors that adds to fp32 is there on a GPU only."""
    monkeypatch.setattr(kernel, "_add_product_of_apex", None)
    with FakeTensorMode():
        total, gradient, states = (
            torch.empty(()).new_empty(size, device="cuda", dtype=dtype)  # `torch.empty` may be the CPU shim's
            for size, dtype in (
                ((VOCAB, HIDDEN), torch.float32),
                ((TOKENS, VOCAB), torch.bfloat16),
                ((TOKENS, HIDDEN), torch.bfloat16),
            )
        )
        for is_first in (True, False):
            kernel._add_product(total, gradient, states, is_first)
        assert total.dtype is torch.float32 and total.is_cuda
