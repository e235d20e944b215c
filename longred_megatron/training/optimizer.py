"""Megatron's data-parallel wrapper and distributed AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Collection, Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from longred_megatron.checkpoint.weight_map import chunk_rules
from longred_megatron.dtypes import DTYPES
from longred_megatron.families import Architecture
from longred_megatron.families.weights import Part
from longred_megatron.model.chunk import ModelChunk
from longred_megatron.precision import Precision
from longred_megatron.recipe import Optimizer


def learning_rate(settings: Optimizer, step: int, num_steps: int) -> float:
    """Learning rate of `step` (from 1): linear warm-up, then constant, or cosine / linear down to `min_lr`."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return settings.min_lr + (settings.lr - settings.min_lr) * remaining


def train_only(parts: Collection[Part] | None, chunks: Sequence[ModelChunk], architecture: Architecture) -> None:
    """Freezes all parameters but those of `parts`; None: none is frozen. Before the chunks are wrapped."""
    for chunk in chunks:
        for name, rule in chunk_rules(chunk, architecture).items():
            chunk.get_parameter(name).requires_grad_(parts is None or rule.part in parts)


def data_parallel(
    chunks: Sequence[ModelChunk], groups: ProcessGroupCollection, overlap: bool, overlap_param_gather: bool = False
) -> list[DistributedDataParallel]:
    """Wraps the student's chunks so that gradients are averaged over the data- and context-parallel ranks.

    overlap: reduce gradients while the last micro-batch's backward pass runs; needs that micro-batch to touch every
    parameter on every replica.
    overlap_param_gather: the optimizer's step leaves a rank with the new values of its own share of the weights alone,
    until `start_gather` and `finish_gather`.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap_param_gather,
        align_param_gather=overlap_param_gather,  # no module starts the next one's: `start_gather` has started all
    )
    chunks = [DistributedDataParallel(s.config, config, s, pg_collection=groups) for s in chunks]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            chunk.config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def start_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Starts to gather the weights that the last step has updated, over the data- and context-parallel ranks.

    A module's forward pass waits for its own: Megatron's hooks see to that. Nothing without `overlap_param_gather`: the
    optimizer's step has done it.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            # In the order of the forward pass, and all of them here: modules that some replicas pass over, as a head
            # that a loss does not need, would start them in different orders.
            for bucket_group in reversed(chunk.bucket_groups):
                if not bucket_group.param_gather_dispatched:
                    bucket_group.start_param_sync()


def finish_gather(chunk: DistributedDataParallel, weight: Tensor | None = None) -> None:
    """Waits for one weight, to be read outside of its module's forward pass; None: for all of the chunk's."""
    if not chunk.ddp_config.overlap_param_gather:
        return
    groups = chunk.bucket_groups
    if weight is not None:  # a frozen one is in none
        groups = [group for parameter, group in chunk.param_to_bucket_group.items() if parameter is weight]
    for bucket_group in groups:
        bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)


def build_optimizer(
    settings: Optimizer, precision: Precision, chunks: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW with fp32 master weights, its state divided over the data-parallel ranks.

    Weight decay leaves out biases and norms (Megatron's rule: tensors of one dim).
    """
    dtype = DTYPES[precision.params]
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)


def set_hyperparameters(optimizer: MegatronOptimizer, settings: Optimizer, step: int, num_steps: int) -> float:
    """Sets every parameter group for step `step` (from 1) of `num_steps` and returns the learning rate."""
    rate = learning_rate(settings, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["betas"], group["eps"] = settings.betas, settings.eps
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]  # Megatron leaves the product to its scheduler
    return rate
