"""Cosine distance: hidden states keep the direction of a teacher's, whatever their length."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# fp32 bytes of one tensor of a chunk: enough rows to fill a GPU, little beside the [tokens, hidden] inputs.
CHUNK_BYTES = 64 * 2**20
# Lower bound of each norm, as in torch.nn.functional.cosine_similarity.
NORM_EPSILON = 1e-8


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of 1 - cos(student, teacher), a scalar in fp32 (fp64 for fp64 inputs).

    student, teacher: hidden states of one layer, [tokens, 1, hidden] (any shape that ends in hidden). The
    gradient has the student's dtype; the teacher gets none. Only the two inputs are kept for the backward
    pass, and all arithmetic is in fp32 on chunks of tokens.

    In LongReD's Eq. 18, L_short is the sum of this over the distilled layers, L_s2l this on the last layer.
    Divided by the number of tokens N_i it is one term of the step loss
        (1/M) * sum over micro-batches i of weight(o_i) * (1/N_i) * sum over tokens of loss_o(token).
    Divisor and weight are the caller's.

    Raises ValueError when the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} hidden states differ in shape; "
            "layer-wise restoration needs equal widths and the same tokens"
        )
    return _CosineDistance.apply(student, teacher)


class _CosineDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        loss = torch.zeros((), dtype=_arithmetic_dtype(student), device=student.device)
        for student_chunk, teacher_chunk in zip(_chunks(student), _chunks(teacher), strict=True):
            s, t, _ = _directions(student_chunk, teacher_chunk)
            loss += (1 - (s * t).sum(-1)).sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        """d(1 - cos)/d student = (cos * s - t) / |student|, where s, t are the unit vectors of the two."""
        student, teacher = ctx.saved_tensors
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        chunks = zip(_chunks(student), _chunks(teacher), _chunks(gradient), strict=True)
        for student_chunk, teacher_chunk, gradient_chunk in chunks:
            s, t, norm = _directions(student_chunk, teacher_chunk)
            cosine = (s * t).sum(-1, keepdim=True)
            gradient_chunk.copy_((cosine * s).sub_(t).mul_(grad_loss / norm))
        return gradient, None


def _arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views [chunk, hidden] of [..., hidden]."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows.split(max(1, CHUNK_BYTES // (4 * hidden.shape[-1])))


def _directions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of both, [chunk, hidden], and the student's norms, [chunk, 1]."""
    s, t = student.to(_arithmetic_dtype(student)), teacher.to(_arithmetic_dtype(student))
    student_norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp_min(NORM_EPSILON)
    teacher_norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(NORM_EPSILON)
    return s / student_norm, t / teacher_norm, student_norm
