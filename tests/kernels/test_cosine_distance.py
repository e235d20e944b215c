import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longred_megatron.kernels import cosine_distance as kernel
from longred_megatron.kernels.cosine_distance import cosine_distance


def hidden_states(tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 1, hidden, dtype=torch.float64, generator=generator)
    scales = torch.logspace(-2, 2, tokens, dtype=torch.float64)  # of different lengths
    return (states * scales[:, None, None]).to(dtype)


def reference(student: torch.Tensor, teacher: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = (1 - cosine_similarity(student, teacher, dim=-1)).sum()
    (scale * loss).backward()
    return loss.detach(), student.grad


@pytest.fixture(params=[None, 1, 5])
def chunk_tokens(request, monkeypatch):
    """Chunks of this many tokens of 24 numbers; None: the module's own."""
    if request.param:
        monkeypatch.setattr(kernel, "CHUNK_BYTES", request.param * 4 * 24)
    return request.param


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradient_equal_cosine_similarity(dtype, tolerance, chunk_tokens):
    student, teacher = (hidden_states(13, 24, dtype, seed) for seed in (0, 1))
    expected, expected_gradient = reference(student, teacher, scale=0.7)
    student.requires_grad_()
    loss = cosine_distance(student, teacher)
    (0.7 * loss).backward()
    assert loss.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(loss.detach(), expected, rtol=tolerance, atol=0)
    # Per token: the gradient shrinks with the state's norm, so an absolute tolerance would hide errors.
    error = (student.grad - expected_gradient).norm(dim=-1) / expected_gradient.norm(dim=-1)
    assert error.max() < tolerance


def test_gradient_is_the_derivative():
    student, teacher = (hidden_states(5, 7, torch.float64, seed) for seed in (2, 3))
    assert torch.autograd.gradcheck(lambda s: cosine_distance(s, teacher), student.requires_grad_())


def test_zero_states_count_as_orthogonal_and_keep_everything_finite():
    student, teacher = (hidden_states(4, 24, torch.float32, seed) for seed in (4, 5))
    student[1], teacher[2] = 0, 0
    expected, expected_gradient = reference(student, teacher, scale=1.0)
    student.requires_grad_()
    loss = cosine_distance(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(student.grad, expected_gradient)
    assert student.grad.isfinite().all()


def test_bf16_is_computed_in_fp32_and_the_gradient_comes_back_in_bf16(chunk_tokens):
    student, teacher = (hidden_states(64, 24, torch.bfloat16, seed) for seed in (6, 7))
    expected, expected_gradient = reference(student.float(), teacher.float(), scale=1.0)
    student.requires_grad_()
    loss = cosine_distance(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    # One rounding to bf16 (8 bits), not several.
    torch.testing.assert_close(student.grad.float(), expected_gradient, rtol=2**-8, atol=1e-7)


def test_bounds_and_scale_invariance():
    states = hidden_states(9, 24, torch.float32, 8)
    assert cosine_distance(states, 3 * states).abs() < 1e-5
    torch.testing.assert_close(cosine_distance(states, -states), torch.tensor(18.0))


def test_the_teacher_gets_no_gradient():
    student, teacher = (hidden_states(3, 24, torch.float32, seed).requires_grad_() for seed in (0, 1))
    cosine_distance(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_the_inputs_and_three_numbers_a_token_are_saved_and_the_rest_comes_in_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 8 * 4 * 24)
    student, teacher = (hidden_states(64, 24, torch.bfloat16, seed) for seed in (0, 1))
    student.requires_grad_()
    saved: list[torch.Tensor] = []
    largest_fp32 = 0

    class LargestFp32(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest_fp32
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                    largest_fp32 = max(largest_fp32, leaf.numel())
            return result

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), LargestFp32():
        cosine_distance(student, teacher).backward()
    inputs, [of_tokens] = saved[:2], saved[2:]
    assert [tensor.data_ptr() for tensor in inputs] == [student.data_ptr(), teacher.data_ptr()]
    assert of_tokens.shape == (3, 64)
    assert largest_fp32 == 8 * 24


def test_no_gradient_is_made_under_no_grad():
    student, teacher = (hidden_states(3, 24, torch.float32, seed).requires_grad_() for seed in (0, 1))
    with torch.no_grad():
        assert not cosine_distance(student, teacher).requires_grad


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 1, 24\] and teacher \[3, 1, 16\]"):
        cosine_distance(torch.ones(3, 1, 24), torch.ones(3, 1, 16))
