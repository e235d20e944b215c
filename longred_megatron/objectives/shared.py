"""Checks and micro-batches that several kinds of objectives share."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longred_megatron.kernels import positions
from longred_megatron.kernels.linear_loss import NO_LABEL
from longred_megatron.objectives.base import Batch, Site


def size_problems(where: str, compared: Mapping[str, str], site: Site) -> Iterator[str]:
    """Whether student and teacher agree in sizes. compared: attribute of Architecture -> what is compared."""
    for attribute, what in compared.items():
        ours, theirs = getattr(site.student, attribute), getattr(site.teacher, attribute)
        if ours != theirs:
            yield (
                f"`{where}` compares {what} one to one: its teacher has {attribute} {theirs}, model.hf {ours}; "
                "choose a teacher of that size"
            )


def masked_problems(where: str, mask_documents: bool, site: Site) -> Iterator[str]:
    """Whether texts of a sequence can be kept from seeing each other here."""
    if mask_documents and site.precision.fp8_attention:
        yield (
            f"`{where}.mask_documents` is true: Transformer Engine's FP8 attention does not train on packed documents; "
            "set `precision.fp8_attention` to false, or mask_documents to false"
        )


def texts(samples: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """tokens and next tokens, both [n, s], of n samples of s + 1 tokens."""
    stacked = torch.from_numpy(np.stack(samples))
    return stacked[:, :-1].clone(), stacked[:, 1:].clone()  # not views: they may be moved and saved apart


def natural_batch(samples: Sequence[NDArray[np.int64]]) -> Batch:
    """For a comparison of all tokens: both models at natural positions, and no next token asked for."""
    tokens, _ = texts(samples)
    natural = positions.natural(*tokens.shape)
    return Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, NO_LABEL),
        student_positions=natural,
        teacher_positions=natural.clone(),
        num_valid_tokens=tokens.numel(),
    )
