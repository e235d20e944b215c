"""The elementwise parts of a layer against the formulas, values and gradients; and what they keep."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from longred_megatron.model.plain_layers import RMSNorm, Rotation, SwiGlu
from longred_megatron.model.rotary import rotary_table

TOKENS, WIDTH = 7, 24


def config(dtype: torch.dtype) -> Any:
    return SimpleNamespace(params_dtype=dtype, layernorm_zero_centered_gamma=False, sequence_parallel=False)


def norm(dtype: torch.dtype) -> RMSNorm:
    module = RMSNorm(config(dtype), WIDTH, eps=1e-3)
    with torch.no_grad():
        module.weight.copy_(torch.rand(WIDTH, dtype=dtype) + 0.5)
    return module


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def kept_bytes(function: Any, *inputs: Tensor) -> int:
    """Of tensors that the graph holds and that are not the inputs."""
    found: dict[int, int] = {}
    known = {x.untyped_storage().data_ptr() for x in inputs}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = function(*inputs)
    assert kept.requires_grad
    return sum(found.values())


def test_norm_gate_and_rotation_have_their_functions_gradients() -> None:
    module = norm(torch.float64)
    inputs = (random(torch.float64, 3, 1, WIDTH), module.weight)
    assert torch.autograd.gradcheck(lambda x, _: module(x), inputs)  # it moves its inputs, so the parameter itself
    assert torch.autograd.gradcheck(SwiGlu(config(torch.float64)), random(torch.float64, 3, 1, 2 * WIDTH))
    rotation = Rotation(*(torch.rand(3, 1, 1, 4, dtype=torch.float64) for _ in range(2)))
    turn = lambda x: rotation.turn(x, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(turn, random(torch.float64, 3, 1, 2, 8))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_norm_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    module, x = norm(dtype), random(dtype, TOKENS, 1, WIDTH)
    out, expected = module(x), rms_norm(x.double(), (WIDTH,), module.weight.double(), 1e-3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, module.weight), gradient)
    ours = torch.autograd.grad(out, (x, module.weight), gradient.to(dtype))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype and float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_its_formula(dtype: torch.dtype) -> None:
    x = random(dtype, TOKENS, 1, 2 * WIDTH)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGlu(config(dtype))(x), silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_megatrons(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 5, 131071, 7, 7, 2, 900])
    table = rotary_table(positions, 1e4 ** -(torch.arange(4) / 4))
    x = random(dtype, TOKENS, 1, 3, 8)
    expected = _apply_rotary_pos_emb_bshd(x.float(), table)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(Rotation.of(table).turn(x, torch.float32), expected, rtol=1e-6, atol=1e-6)
    turned = Rotation.of(table).turn(x, dtype)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.float(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    [ours], [wanted] = torch.autograd.grad(turned, x, gradient.to(dtype)), torch.autograd.grad(expected, x, gradient)
    torch.testing.assert_close(ours.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_keep_no_copies(dtype: torch.dtype) -> None:
    module, x = norm(dtype), random(dtype, TOKENS, 1, 2 * WIDTH)
    half = x.detach()[..., :WIDTH].contiguous().requires_grad_()
    assert kept_bytes(lambda x, _: module(x), half, module.weight) == 4 * TOKENS  # a number a token
    assert kept_bytes(SwiGlu(config(dtype)), x) == 0
    rotation = Rotation.of(torch.rand(TOKENS, 1, 1, 8))
    assert kept_bytes(lambda x, *_: rotation.turn(x, dtype), random(dtype, TOKENS, 1, 3, 8), *rotation) == 0
