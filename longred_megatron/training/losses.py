"""The loss one pipeline stage owes for one micro-batch."""

from collections.abc import Mapping

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from longred_megatron.kernels.cosine_distance import restoration_loss
from longred_megatron.kernels.cross_entropy import linear_cross_entropy
from longred_megatron.kernels.divergence import linear_distillation
from longred_megatron.model.stage import Stage
from longred_megatron.recipe.schema import Objective, PackedDistillation
from longred_megatron.training.microbatches import MicroBatch
from longred_megatron.training.order import HIDDEN_STATE_OBJECTIVES


def stage_losses(
    stage: Stage,
    microbatch: MicroBatch,
    settings: Objective,
    output: Tensor,
    states: Mapping[int, Tensor],
    targets: Mapping[int, Tensor],
    teacher: Stage | None,
    groups: ProcessGroupCollection,
) -> dict[str, Tensor]:
    """This rank's share of the micro-batch's losses on this stage, by metric name, without the objective's weight.

    Each is (sum over this rank's tokens) / N, N = the micro-batch's valid tokens on all context-parallel ranks: summed
    over the context group (and, with sequence parallelism, the tensor group) it is the mean over the tokens.

    Args:
        settings: of the micro-batch's objective.
        output: [tokens, 1, hidden] from the stage.
        states, targets: {the student's layer: hidden states} of the student and of the teacher.
        teacher: its last chunk on this rank, if there is a teacher.
    """
    name, num_tokens = f"loss/{microbatch.objective}", microbatch.num_valid_tokens
    if microbatch.objective in HIDDEN_STATE_OBJECTIVES:
        return {f"{name}/layer_{k}": restoration_loss(states[k], targets[k]) / num_tokens for k in states}
    if not stage.post_process:
        return {}
    hidden, labels = _all_tokens(stage, output, groups), microbatch.labels.reshape(-1)
    group = groups.tp if groups.tp.size() > 1 else None
    vocab_size = stage.architecture.vocab_size
    if not isinstance(settings, PackedDistillation) or not settings.needs_teacher:
        loss = linear_cross_entropy(hidden, stage.head_weight(), labels, vocab_size=vocab_size, group=group)
    else:
        assert teacher is not None
        (target,) = targets.values()
        loss = linear_distillation(
            hidden,
            stage.head_weight(),
            _all_tokens(teacher, target, groups),
            teacher.head_weight(),
            labels,
            # One tokenizer, but released models pad their vocabularies to different sizes.
            vocab_size=min(vocab_size, teacher.architecture.vocab_size),
            direction=settings.direction,
            temperature=settings.temperature,
            top_k=settings.top_k,
            cross_entropy=settings.cross_entropy,
            group=group,
        )
    return {name: loss / num_tokens}


def _all_tokens(stage: Stage, output: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """[tokens, hidden] on every tensor rank, for its part of the vocabulary; backward sums the gradient's parts."""
    if stage.config.sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=True, group=groups.tp)
    else:
        output = copy_to_tensor_model_parallel_region(output, group=groups.tp)
    return output.squeeze(1)
