from itertools import pairwise, product

import pytest
import torch
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longred_megatron.kernels import relation_divergence as module
from longred_megatron.kernels.relation_divergence import relation_divergence

SEQUENCES, TOKENS, HEADS, HEAD_DIM, TEACHER_HEAD_DIM = 2, 13, 3, 6, 5
SCALE = 0.37  # of the loss, as the caller's divisor and weight
TOLERANCES = ((torch.float64, 1e-12), (torch.float32, 1e-5))


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> list[torch.Tensor]:
    """Student and teacher [sequences, tokens, heads, head_dim], in Megatron's memory order: tokens first."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, SEQUENCES, HEADS, head_dim) for head_dim in (HEAD_DIM, TEACHER_HEAD_DIM))
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [(1.5 * tensor).to(dtype).transpose(0, 1) for tensor in tensors]


def scores(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.einsum("brhd,bchd->bhrc", rows, columns) / rows.shape[-1] ** 0.5


def reference(student, teacher, student_columns=None, teacher_columns=None, first_row=0) -> list[torch.Tensor]:
    """Loss and gradients of what `computed` has, by torch's autograd in float64."""
    tensors = [one.detach().double().requires_grad_() for one in (student, student_columns) if one is not None]
    rows, columns = tensors[0], tensors[-1]
    teacher, teacher_columns = (
        one.double() for one in (teacher, teacher if teacher_columns is None else teacher_columns)
    )
    future = torch.ones(rows.shape[1], columns.shape[1], dtype=torch.bool).triu(first_row + 1)
    p_t = scores(teacher, teacher_columns).masked_fill(future, -torch.inf).softmax(-1)
    log_s = scores(rows, columns).masked_fill(future, -torch.inf).log_softmax(-1)
    loss = kl_div(log_s.masked_fill(future, 0), p_t, reduction="sum")
    (SCALE * loss).backward()
    return [loss.detach(), *(one.grad for one in tensors)]


def computed(student, teacher, student_columns=None, teacher_columns=None, first_row=0) -> list[torch.Tensor]:
    """Loss, gradient by student and, if there are columns, by student_columns."""
    student = student.detach().clone().requires_grad_()
    if student_columns is not None:
        student_columns = student_columns.detach().clone().requires_grad_()
    loss = relation_divergence(student, teacher, student_columns, teacher_columns, first_row=first_row)
    (SCALE * loss).backward()
    return [loss.detach(), *(one.grad for one in (student, student_columns) if one is not None)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def assert_all_close(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, wanted in zip(actual, expected, strict=True):
        assert one.shape == wanted.shape and relative_error(one, wanted) < tolerance


# (rows, pairs of sequence and head) of a block; None: the module's own. In 2 x 3 pairs: parts of a sequence's heads,
# one sequence, both.
BLOCKS = [None, *product((1, 2, 5, TOKENS), (1, 2, 3, 6))]


@pytest.fixture(params=BLOCKS, ids=str)
def block(request, monkeypatch):
    if request.param:
        rows, pairs = request.param
        monkeypatch.setattr(module, "BLOCK_ROWS", rows)
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * TOKENS * rows * pairs)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_loss_and_gradient_equal_autograd(dtype, tolerance, block):
    tensors = inputs(dtype)
    actual = computed(*tensors)
    assert [one.dtype for one in actual] == [dtype, dtype] and actual[0].shape == ()
    assert_all_close(actual, reference(*tensors), tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("first_row, num_rows", [(0, 1), (0, 4), (3, 7), (5, 8), (12, 1)])
def test_rows_related_to_more_columns_equal_autograd(dtype, tolerance, first_row, num_rows, block):
    columns = inputs(dtype)
    rows = [one.roll(1, 1)[:, first_row : first_row + num_rows] for one in columns]  # others than the columns' own
    actual = computed(*rows, *columns, first_row=first_row)
    expected = reference(*rows, *columns, first_row=first_row)
    if (first_row, num_rows) == (0, 1):  # one column: no choice, no divergence
        assert not any(one.any() for one in actual)
    else:
        assert_all_close(actual, expected, tolerance)
    assert not actual[2][:, first_row + num_rows :].any()


@pytest.mark.parametrize("cuts", [(6,), (1, 12), (3, 6, 9)])
def test_pieces_of_a_sequence_sum_to_the_whole(cuts, block):
    """As ranks of context parallelism have them: rows of their own, the columns of all."""
    student, teacher = inputs(torch.float64)
    bounds = (0, *cuts, TOKENS)
    total = torch.zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(student)
    for start, stop in pairwise(bounds):
        piece = slice(start, stop)
        loss, by_rows, by_columns = computed(student[:, piece], teacher[:, piece], student, teacher, first_row=start)
        total += loss
        gradient[:, piece] += by_rows
        gradient += by_columns
    assert_all_close([total, gradient], computed(student, teacher), 1e-12)
    assert_all_close([total, gradient], reference(student, teacher), 1e-12)


def test_rows_given_as_columns_too_equal_no_columns():
    student, teacher = inputs(torch.float64)
    loss, by_rows, by_columns = computed(student, teacher, student, teacher)
    assert_all_close([loss, by_rows + by_columns], computed(student, teacher), 1e-12)
    # One tensor in both places gets both.
    student.requires_grad_()
    (SCALE * relation_divergence(student, teacher, student, teacher)).backward()
    assert_all_close([student.grad], [by_rows + by_columns], 1e-12)


def test_gradient_is_the_derivative(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 2)
    student, teacher = (one[:, :5].contiguous() for one in inputs(torch.float64))
    assert torch.autograd.gradcheck(lambda s: relation_divergence(s, teacher), student.clone().requires_grad_())
    rows, teacher_rows = student[:, 2:4].clone(), teacher[:, 2:4]
    assert torch.autograd.gradcheck(
        lambda r, c: relation_divergence(r, teacher_rows, c, teacher, first_row=2),
        (rows.requires_grad_(), student.requires_grad_()),
    )


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_bf16_has_fp32_softmax_and_returns_bf16_gradients(device, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    columns = inputs(torch.bfloat16, tokens=128)
    rows = [one[:, 40:100] for one in columns]
    for arguments, first_row in ((columns, 0), ((*rows, *columns), 40)):
        actual = computed(*(one.to(device) for one in arguments), first_row=first_row)
        assert actual[0].dtype == torch.float32
        assert all(gradient.dtype == torch.bfloat16 for gradient in actual[1:])
        loss, *gradients = (one.cpu() for one in actual)
        expected_loss, *expected = reference(*arguments, first_row=first_row)
        assert_all_close([loss], [expected_loss], 1e-5)
        # Two roundings to bf16, on a GPU also that of p_s - p_t; the gradient of each piece is summed in fp32.
        assert_all_close(gradients, expected, 2**-8)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_same_model_does_not_diverge(dtype, bound):
    student, _ = inputs(dtype)
    loss, gradient = computed(student, student)
    assert loss.abs() < bound and gradient.abs().max() < bound


def test_large_scores_stay_finite():
    student, teacher = (1000 * one for one in inputs(torch.float32))
    for tensors in ((student, teacher), (student, teacher, student, teacher)):
        loss, *gradients = computed(*tensors)
        assert relative_error(loss, reference(*tensors)[0]) < 1e-5
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_later_tokens_change_nothing():
    student, teacher = inputs(torch.float64)
    before = computed(student[:, :7], teacher[:, :7], student, teacher)
    student[:, 7:], teacher[:, 7:] = 50, -50
    after = computed(student[:, :7], teacher[:, :7], student, teacher)
    assert all(map(torch.equal, before, after))


def test_only_student_tensors_that_need_a_gradient_get_one():
    names = ("student", "teacher", "student_columns", "teacher_columns")
    expected = dict(zip(("student", "student_columns"), computed(*2 * inputs(torch.float64))[1:], strict=True))
    for needs in (names, ("student", "teacher"), ("student_columns",)):
        tensors = dict(zip(names, (one.clone() for one in 2 * inputs(torch.float64)), strict=True))
        for name in needs:
            tensors[name].requires_grad_()
        (SCALE * relation_divergence(**tensors)).backward()
        for name, tensor in tensors.items():
            if name in needs and name in expected:
                assert torch.equal(tensor.grad, expected[name])
            else:
                assert tensor.grad is None
    with torch.no_grad():
        assert not relation_divergence(**tensors).requires_grad


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_to_relate_gives_zero(shape):
    loss, gradient = computed(torch.zeros(*shape, 6), torch.zeros(*shape, 5))
    assert loss == 0 and gradient.shape == (*shape, 6)
    if shape[1] == 0:
        columns = [torch.ones(2, 4, 3, head_dim) for head_dim in (6, 5)]
        loss, _, gradient = computed(torch.zeros(*shape, 6), torch.zeros(*shape, 5), *columns, first_row=2)
        assert loss == 0 and gradient.shape == (2, 4, 3, 6) and not gradient.any()


class Recorder(TorchDispatchMode):
    """The number of matrix products, and of the largest tensor's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_products += func._schema.name == "aten::bmm"
        self.largest = max(self.largest, *(one.numel() for one in tree_leaves(result) if torch.is_tensor(one)), 0)
        return result


def test_blocks_are_bounded_and_one_gradient_is_saved(monkeypatch):
    tokens, rows = 256, 8
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * tokens * HEADS * rows)
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    student, teacher = inputs(torch.bfloat16, tokens)
    student.requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), Recorder() as recorder:
        relation_divergence(student, teacher).backward()
    assert [(one.shape, one.dtype) for one in saved] == [(student.shape, student.dtype)]
    assert recorder.num_products == 4 * SEQUENCES * tokens // rows
    assert recorder.largest == max(tokens * HEADS * rows, student.numel())
    with torch.no_grad(), Recorder() as recorder:
        relation_divergence(student, teacher)
    assert recorder.num_products == 2 * SEQUENCES * tokens // rows


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student": (13, 3, 6)}, r"student \[13, 3, 6\] must have the shape \[sequences, tokens, heads, head_dim\]"),
        ({"teacher": (2, 13, 3)}, r"teacher \[2, 13, 3\] must have the shape"),
        (
            {"teacher": (2, 12, 3, 5)},
            r"student \[2, 13, 3, 6\] and teacher \[2, 12, 3, 5\] may differ only in head_dim",
        ),
        ({"teacher": (2, 13, 4, 5)}, "may differ only in head_dim"),
        ({"teacher": (1, 13, 3, 5)}, "may differ only in head_dim"),
        ({"first_row": 1}, "first_row 1 must be 0 without columns"),
        ({"student_columns": (2, 20, 3, 6)}, "student_columns and teacher_columns must both be given, or neither"),
        ({"student_columns": (2, 20, 3, 6), "teacher_columns": (2, 19, 3, 5)}, "may differ only in head_dim"),
        ({"student_columns": (2, 20, 3, 7), "teacher_columns": (2, 20, 3, 5)}, "student .* may differ only in tokens"),
        ({"student_columns": (2, 20, 3, 6), "teacher_columns": (2, 20, 3, 6)}, "teacher .* may differ only in tokens"),
        ({"student_columns": (1, 20, 3, 6), "teacher_columns": (1, 20, 3, 5)}, "may differ only in tokens"),
        (
            {"student_columns": (2, 20, 3, 6), "teacher_columns": (2, 20, 3, 5), "first_row": 8},
            "first_row 8 with 13 rows is outside the 20 columns",
        ),
        (
            {"student_columns": (2, 20, 3, 6), "teacher_columns": (2, 20, 3, 5), "first_row": -1},
            "first_row -1 with 13 rows is outside",
        ),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"student": (2, 13, 3, 6), "teacher": (2, 13, 3, 5)} | changes
    with pytest.raises(ValueError, match=message):
        relation_divergence(
            **{name: one if name == "first_row" else torch.ones(one) for name, one in arguments.items()}
        )
