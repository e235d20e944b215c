from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longred_megatron.analysis import emulated_fp8
from longred_megatron.analysis.emulated_fp8 import (
    E5M2,
    Delayed,
    Emulator,
    blocks,
    casts,
    linear_layers,
    round_to_fp8,
    tensorwise,
)
from longred_megatron.precision import Scaling
from tests.checkpoint.small_models import write_model


@pytest.mark.parametrize(("number", "largest"), [(torch.float8_e4m3fn, 448), (E5M2, 57344)])
def test_what_fp8_holds_stays(number: torch.dtype, largest: float) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(number).float()
    numbers = numbers[numbers.isfinite()]
    assert numbers.max() == largest and torch.equal(tensorwise(numbers, number), numbers)  # so the scale is 1


def test_rounding_is_of_four_bits_and_of_three() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    error = (tensorwise(x) / x - 1).abs()
    assert 0.02 < error.max() <= 2**-4
    error = (tensorwise(x, E5M2) / x - 1).abs()
    assert 2**-4 < error.max() <= 2**-3


def test_zeros_stay_zeros() -> None:
    assert not tensorwise(torch.zeros(4)).any()


@pytest.mark.parametrize(("width", "height"), [(32, 1), (128, 128)])
def test_a_block_has_its_own_scale(width: int, height: int) -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    reference = torch.empty_like(x)
    for i in range(0, 200, height):
        for j in range(0, 300, width):
            tile = x[i : i + height, j : j + width]
            reference[i : i + height, j : j + width] = round_to_fp8(tile, tile.abs().amax(), power_of_two=True)
    assert torch.equal(blocks(x, width, height), reference)


def test_delayed_scales_come_from_the_casts_before() -> None:
    cast, one = Delayed(), torch.tensor([1.0, 0.3])
    assert torch.equal(cast(one), tensorwise(one))
    assert cast(torch.tensor([9.0])).item() == 1  # larger than all before: cut
    assert cast(torch.tensor([9.0])).item() == 9


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    write_model("llama_3", folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Casts that change nothing."""
    monkeypatch.setattr(emulated_fp8, "round_to_fp8", lambda x, *rest, **more: x.float())
    monkeypatch.setattr(emulated_fp8, "QUERY_CHUNK", 5)
    yield


TOKENS = torch.arange(13)[None]


def logits_and_gradients(network: Any) -> list[Tensor]:
    """Of a loss by every matrix of the layers."""
    weights = [module.weight for module in linear_layers(network)]
    logits = network(TOKENS).logits
    return [logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), weights)]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("scaling", get_args(Scaling))
def test_without_casts_it_is_the_model_and_its_gradients(network: Any, scaling: Scaling) -> None:
    with Emulator(network, scaling, attention=True).on():
        emulated = logits_and_gradients(network)
    torch.testing.assert_close(emulated, logits_and_gradients(network), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [False, True])
def test_gradients_move_as_far_as_their_rounding_does(network: Any, attention: bool) -> None:
    """Each rounding is off by an eighth at most; with those that meet in a weight, by some percent."""
    plain = logits_and_gradients(network)
    with Emulator(network, "tensorwise", attention).on():
        emulated = logits_and_gradients(network)
    for ours, theirs in zip(emulated[1:], plain[1:], strict=True):
        assert 0.005 < (ours - theirs).norm() / theirs.norm() < 0.3


def test_blocks_lie_along_the_inner_dim_of_each_product() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = (70, 90), (40, 90), (70, 40)
    x, weight, gradient = (torch.randn(*size, generator=draw) for size in sizes)
    for each in (x, weight, gradient):  # powers of two apart, scales would be seen by none
        each *= torch.exp2(12 * torch.randn(each.shape, generator=draw))
    x.requires_grad_(), weight.requires_grad_()
    out = emulated_fp8._Product.apply(x, weight, casts("mxfp8"))
    x_in, weight_in = blocks(x, 32), blocks(weight, 32)
    of_out, weight_out = blocks(gradient, 32, number=E5M2), blocks(weight.t(), 32)
    of_tokens, x_tokens = blocks(gradient.t(), 32, number=E5M2), blocks(x.t(), 32)
    torch.testing.assert_close(out, x_in @ weight_in.t())
    found = torch.autograd.grad(out, (x, weight), gradient)
    torch.testing.assert_close(found, (of_out @ weight_out.t(), of_tokens @ x_tokens.t()))


@torch.no_grad()
def test_the_model_is_as_before(network: Any) -> None:
    before = network(TOKENS).logits
    with Emulator(network, "tensorwise", attention=True).on():
        assert not torch.equal(network(TOKENS).logits, before)
    assert torch.equal(network(TOKENS).logits, before)


@pytest.mark.parametrize(("scaling", "attention", "leaks"), [("mxfp8", False, False), ("mxfp8", True, True)])
@torch.no_grad()
def test_a_later_token_changes_earlier_ones_where_they_share_a_scale(
    network: Any, scaling: Scaling, attention: bool, leaks: bool
) -> None:
    """Transformer Engine's issue 3248, which the recipe's message tells."""

    def first(last: int) -> Tensor:
        with Emulator(network, scaling, attention).on():
            return network(torch.cat((TOKENS, torch.tensor([[last]])), 1)).logits[:, :-1]

    assert all(torch.equal(first(20), first(other)) for other in range(21, 40)) != leaks


def test_a_head_is_never_in_fp8(network: Any) -> None:
    forwards = [module for module, _ in Emulator(network, "tensorwise", attention=False)._forwards]
    assert network.lm_head not in forwards and network.model.layers[0].mlp.up_proj in forwards
