"""A loss on a pipeline stage that is not the last joins the backward pass through the stage's output."""

from typing import Any

import torch
from torch import Tensor


class _InjectLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = torch.ones_like(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        return output_gradient, ctx.loss_like


def inject_loss(output: Tensor, loss: Tensor) -> Tensor:
    """Returns `output` unchanged; backward adds d(loss)/d(parameters) to whatever gradient reaches `output`.

    The scale of the loss is part of `loss`, so it belongs to its own micro-batch however many are in flight
    (Megatron's auxiliary-loss scalers keep it in a class attribute that another micro-batch may have set).

    Args:
        output: the chunk's hidden states, any shape.
        loss: scalar, already weighted and scaled.
    """
    return _InjectLoss.apply(output, loss)
