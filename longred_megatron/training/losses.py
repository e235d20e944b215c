"""The loss one pipeline stage owes for one micro-batch."""

from collections.abc import Mapping

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from longred_megatron.data.microbatch import MicroBatch
from longred_megatron.model.stage import Stage
from longred_megatron.objectives.cross_entropy import linear_cross_entropy
from longred_megatron.objectives.mixture import CROSS_ENTROPY_OBJECTIVES
from longred_megatron.objectives.restoration import restoration_loss


def stage_losses(
    stage: Stage,
    microbatch: MicroBatch,
    output: Tensor,
    states: Mapping[int, Tensor],
    targets: Mapping[int, Tensor],
    groups: ProcessGroupCollection,
) -> dict[str, Tensor]:
    """This rank's share of the micro-batch's losses on this stage, by metric name, without the objective's weight.

    Each is (sum over this rank's tokens) / N, N = the micro-batch's valid tokens on all context-parallel ranks: summed
    over the context group (and, with sequence parallelism, the tensor group) it is the mean over the tokens.

    Args:
        output: [tokens, 1, hidden] from the stage; states, targets: {layer: hidden states} of student and teacher.
    """
    name, num_tokens = f"loss/{microbatch.objective}", microbatch.num_valid_tokens
    if microbatch.objective not in CROSS_ENTROPY_OBJECTIVES:
        return {f"{name}/layer_{k}": restoration_loss(states[k], targets[k]) / num_tokens for k in states}
    if not stage.post_process:
        return {}
    # Every tensor rank needs all tokens for its part of the vocabulary; backward sums the parts of the gradient.
    if stage.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=True, group=groups.tp)
    else:
        hidden = copy_to_tensor_model_parallel_region(output, group=groups.tp)
    loss = linear_cross_entropy(
        hidden.squeeze(1),
        stage.head_weight(),
        microbatch.labels.reshape(-1),
        vocab_size=stage.architecture.vocab_size,
        group=groups.tp if groups.tp.size() > 1 else None,
    )
    return {name: loss / num_tokens}
