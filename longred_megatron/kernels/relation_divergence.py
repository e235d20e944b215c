"""Divergence of a student's self-relations from a teacher's, in memory linear in the length."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longred_megatron.kernels.linear_loss import arithmetic_dtype

# fp32 bytes of one [heads, rows, columns] block of scores, of which three are alive (and a 16-bit one on a GPU).
BLOCK_BYTES = 64 * 2**20
# The most rows of a block. All of them have the columns that the last one reaches, so n blocks compute (n + 1) / n
# times the causal half; but each block reads and writes the columns' fp32 gradient [columns, head_dim], which should be
# little beside about ten passes over its scores [rows, columns]. On a CPU, at 4096 tokens and head_dim 64, 64 to 256
# rows take equally long, 1024 take 1.8 times as long.
BLOCK_ROWS = 256
# A score without probability. Finite, so that the difference of two is 0 and not NaN.
NO_PROBABILITY = -1e30


def working_bytes(num_sequences: float, num_heads: float, num_rows: float, num_columns: float) -> float:
    """Of the scores of a block, where a sequence has so many rows and columns of them."""
    rows = min(BLOCK_ROWS, num_rows)
    return 3 * min(BLOCK_BYTES, 4 * num_sequences * num_heads * rows * num_columns)


def relation_divergence(
    student: Tensor,
    teacher: Tensor,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
    *,
    first_row: int = 0,
) -> Tensor:
    """Sum over sequences, heads and rows i of KL(p_t[i] || p_s[i]), a scalar in fp32 (fp64 for fp64 inputs), where
        p[i] = softmax over columns j = 0 ... first_row + i of (row_i . column_j / sqrt(head_dim))
        KL(p_t || p_s) = sum over j of p_t[j] * log(p_t[j] / p_s[j])
    with p_s from the student and p_t from the teacher.

    - student, teacher: queries, keys or values of one layer, [sequences, rows, heads, head_dim]. The two models may
      differ in head_dim.
    - student_columns, teacher_columns: the tokens that the rows are related to, [sequences, columns, heads, head_dim]
      in the dtype of the rows. None: the rows themselves.
    - first_row: row i is token first_row + i of the columns. With a sequence's rows cut in pieces (context
      parallelism), the sum over pieces is the loss of the whole.

    On a layer's queries, keys or values this is, up to its divisor, the layer's Q/Q, K/K or V/V term in LinearARD's
    loss (arXiv 2604.00004). Divided by the number of heads and the number of tokens N_i it is one term of the step loss
        (1/M) * sum over micro-batches i of weight(o_i) * (1/N_i) * sum over tokens of loss_o(token).
    Divisors and weight are the caller's.

    The gradients by student and student_columns (without columns, their sum) are made in the forward pass, while a
    block's scores are there: four matrix products a block in all, where recomputing the scores would take six. They are
    summed in fp32 (fp64), kept in the inputs' dtype, and are all that is kept for the backward pass. The teacher gets
    none. Can be differentiated once.

    Softmax, KL and sums run in fp32 (fp64). Matrix products do too, except those of 16-bit inputs on a GPU: these take
    16-bit factors and give fp32, so the scores are not rounded to 16 bits; their gradient p_s - p_t is.

    Raises ValueError when the shapes do not fit, or first_row is outside the columns.
    """
    _check(student, teacher, student_columns, teacher_columns, first_row)
    needs_rows = torch.is_grad_enabled() and student.requires_grad
    needs_columns = torch.is_grad_enabled() and student_columns is not None and student_columns.requires_grad
    return _RelationDivergence.apply(
        student, teacher, student_columns, teacher_columns, first_row, needs_rows, needs_columns
    )


class _RelationDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        student_columns: Tensor | None,
        teacher_columns: Tensor | None,
        first_row: int,
        needs_rows: bool,
        needs_columns: bool,
    ) -> Tensor:
        dtype = arithmetic_dtype(student)
        loss = torch.zeros((), dtype=dtype, device=student.device)
        grad_rows = _empty_like(student) if needs_rows else None
        grad_columns = _empty_like(student_columns) if needs_columns and student_columns is not None else None
        sequences, num_rows, heads, head_dim = student.shape
        row_bytes = 4 * max(1, first_row + num_rows)
        block_rows = max(1, min(BLOCK_ROWS, num_rows, BLOCK_BYTES // row_bytes))
        # Of all sequences: a block may have several heads of several sequences.
        block_heads = max(1, BLOCK_BYTES // (row_bytes * block_rows))
        for group in _groups(sequences, heads, block_heads):
            rows, teacher_rows = _by_head(student, group), _by_head(teacher, group)
            columns = rows if student_columns is None else _by_head(student_columns, group)
            teachers = teacher_rows if teacher_columns is None else _by_head(teacher_columns, group)
            # fp32 until all blocks have added to it.
            by_rows = torch.zeros_like(rows, dtype=dtype) if needs_rows else None
            by_columns = torch.zeros_like(columns, dtype=dtype) if needs_columns else None
            if student_columns is None:
                by_columns = by_rows
            for start in range(0, num_rows, block_rows):
                block = slice(start, min(start + block_rows, num_rows))
                reach = slice(0, first_row + block.stop)
                block_loss, by_scores = _divergence(
                    _log_probabilities(rows[:, block], columns[:, reach]),
                    _log_probabilities(teacher_rows[:, block], teachers[:, reach]),
                )
                loss += block_loss
                by_scores = by_scores.to(rows.dtype)  # 16 bits on a GPU
                if by_rows is not None:
                    by_rows[:, block] += _product(by_scores, columns[:, reach])
                if by_columns is not None:
                    by_columns[:, reach] += _product(by_scores.transpose(1, 2), rows[:, block])
                del by_scores  # before the next block's scores are there
            for gradient, by_head in ((grad_rows, by_rows), (grad_columns, by_columns)):
                if gradient is not None and by_head is not None:
                    target = gradient[group].transpose(1, 2)
                    target.copy_(by_head.div_(math.sqrt(head_dim)).view(target.shape))
        ctx.save_for_backward(grad_rows, grad_columns)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_columns = (None if one is None else one * grad_loss for one in ctx.saved_tensors)
        return grad_rows, None, grad_columns, None, None, None, None


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _groups(sequences: int, heads: int, size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Indices of [sequences, tokens, heads]: all tokens of at most `size` pairs of sequence and head at a time."""
    num_sequences, num_heads = max(1, size // max(1, heads)), min(size, max(1, heads))
    for sequence in range(0, sequences, num_sequences):
        for head in range(0, heads, num_heads):
            yield slice(sequence, sequence + num_sequences), slice(None), slice(head, head + num_heads)


def _by_head(tensor: Tensor, group: tuple[slice, slice, slice]) -> Tensor:
    """A group of [sequences, tokens, heads, head_dim] as [sequences * heads, tokens, head_dim]: in its dtype on a GPU,
    elsewhere in the arithmetic's, which `_product` needs there."""
    tensors = tensor[group].transpose(1, 2).flatten(0, 1)
    return tensors if tensor.is_cuda else tensors.to(arithmetic_dtype(tensor))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, batched, in fp32 (fp64). Of 16-bit factors only torch's CUDA product has a result in fp32."""
    dtype = arithmetic_dtype(left)
    return torch.bmm(left, right) if left.dtype == dtype else torch.bmm(left, right, out_dtype=dtype)


def _log_probabilities(rows: Tensor, columns: Tensor) -> Tensor:
    """log p [heads, rows, columns] of rows [heads, rows, head_dim] and columns [heads, columns, head_dim]; the last row
    is the token of the last column."""
    scores = _product(rows, columns.transpose(1, 2)).div_(math.sqrt(rows.shape[2]))
    num_rows = rows.shape[1]
    future = torch.ones(num_rows, num_rows, dtype=torch.bool, device=rows.device).triu_(1)
    scores[:, :, -num_rows:].masked_fill_(future, NO_PROBABILITY)
    return scores.log_softmax(-1)


def _divergence(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over all rows of KL(p_t || p_s), and its gradient by the student's scores, p_s - p_t. Overwrites both."""
    p_t = log_t.exp()
    loss = log_t.sub_(log_s).mul_(p_t).sum()
    return loss, log_s.exp_().sub_(p_t)


def _check(
    student: Tensor,
    teacher: Tensor,
    student_columns: Tensor | None,
    teacher_columns: Tensor | None,
    first_row: int,
) -> None:
    given = {"student": student, "teacher": teacher}
    if student_columns is not None and teacher_columns is not None:
        given |= {"student_columns": student_columns, "teacher_columns": teacher_columns}
    elif student_columns is not None or teacher_columns is not None:
        raise ValueError("student_columns and teacher_columns must both be given, or neither")
    elif first_row != 0:
        raise ValueError(f"first_row {first_row} must be 0 without columns: the rows are then the columns")
    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    _check_shapes(shapes)
    num_rows, num_columns = student.shape[1], shapes.get("student_columns", shapes["student"])[1]
    if not 0 <= first_row <= num_columns - num_rows:
        raise ValueError(f"first_row {first_row} with {num_rows} rows is outside the {num_columns} columns")


def _check_shapes(shapes: dict[str, list[int]]) -> None:
    """Of the tensors given, by name: rows and columns of the student, and of the teacher."""
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(f"{name} {shape} must have the shape [sequences, tokens, heads, head_dim]")
    # Relations are compared token by token and head by head; only head_dim is a model's own.
    for one, other in (("student", "teacher"), ("student_columns", "teacher_columns")):
        if one in shapes and shapes[one][:3] != shapes[other][:3]:
            raise ValueError(f"{one} {shapes[one]} and {other} {shapes[other]} may differ only in head_dim")
    for rows, columns in (("student", "student_columns"), ("teacher", "teacher_columns")):
        if columns in shapes and shapes[rows][:1] + shapes[rows][2:] != shapes[columns][:1] + shapes[columns][2:]:
            raise ValueError(f"{rows} {shapes[rows]} and {columns} {shapes[columns]} may differ only in tokens")
