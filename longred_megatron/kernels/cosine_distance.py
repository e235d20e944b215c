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
    gradient has the student's dtype; the teacher gets none. Only the two inputs and three numbers a token are kept for
    the backward pass, and all arithmetic is in fp32 on chunks of tokens.

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
        chunks = zip(_chunks(student), _chunks(teacher), strict=True)
        of_tokens = torch.cat([_cosine_and_norms(*chunk) for chunk in chunks], dim=1)
        ctx.save_for_backward(student, teacher, of_tokens)
        return (1 - of_tokens[0]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        """d(1 - cos)/d student = (cos * student / |student| - teacher / |teacher|) / |student|."""
        student, teacher, of_tokens = ctx.saved_tensors
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        in_chunks = of_tokens.split(_chunk_tokens(student), dim=1)
        chunks = zip(_chunks(student), _chunks(teacher), _chunks(gradient), in_chunks, strict=True)
        for s, t, out, (cosine, student_norm, teacher_norm) in chunks:
            scale = grad_loss / student_norm
            by_student, by_teacher = cosine * scale / student_norm, -scale / teacher_norm
            out.copy_((s * by_student[:, None]).addcmul_(t, by_teacher[:, None]))
        return gradient, None


def _arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views [chunk, hidden] of [..., hidden]."""
    return hidden.reshape(-1, hidden.shape[-1]).split(_chunk_tokens(hidden))


def _chunk_tokens(hidden: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * hidden.shape[-1]))


def _cosine_and_norms(student: Tensor, teacher: Tensor) -> Tensor:
    """[3, chunk] of two [chunk, hidden]: their cosine, the student's norm, the teacher's."""
    s, t = student.to(_arithmetic_dtype(student)), teacher.to(_arithmetic_dtype(student))
    norms = [torch.linalg.vector_norm(x, dim=-1).clamp_min(NORM_EPSILON) for x in (s, t)]
    return torch.stack([(s * t).sum(-1) / (norms[0] * norms[1]), *norms])
