"""Floating-point operations a training step needs, for model FLOPs utilization."""

from longred_megatron.recipe import Phase


def step_flops(phase: Phase) -> float:
    """Of one optimizer step over all ranks."""
    return sum(each.microbatches * microbatch_flops(phase, name) for name, each in phase.recipe.objectives.items())


def microbatch_flops(phase: Phase, objective: str) -> float:
    """Of one micro-batch over all its ranks: the student's forward and backward (twice the forward), the teacher's
    forward, and what the loss takes beside both.

    Recomputed activations do not count: they are a choice, not part of the model.
    """
    needs, site, settings = phase.needs[objective], phase.sites[objective], phase.recipe.objectives[objective]
    source, length = phase.source, settings.sequence_length
    per_token = 3 * source.forward_flops_per_token(source.num_layers, length, needs.student_head)
    if needs.teacher:
        depth, head = phase.teacher_depth(objective), phase.teacher_head(objective)
        per_token += site.teacher.forward_flops_per_token(depth, length, head)
    return site.tokens_per_microbatch * per_token + settings.own_flops(site)
