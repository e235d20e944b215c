"""Floating-point operations a training step needs, for model FLOPs utilization."""

from longred_megatron.recipe import Phase


def step_flops(phase: Phase) -> float:
    """Of one optimizer step over all ranks: the student's forward and backward (twice the forward), the teachers'
    forward, and what losses take beside both. Recomputed activations do not count: they are a choice, not part of the
    model."""
    total, source = 0.0, phase.source
    for name, settings in phase.recipe.objectives.items():
        needs, site, length = phase.needs[name], phase.sites[name], settings.sequence_length
        per_token = 3 * source.forward_flops_per_token(source.num_layers, length, needs.student_head)
        if needs.teacher:
            depth = needs.teacher_depth(site.teacher.num_layers)
            per_token += site.teacher.forward_flops_per_token(depth, length, needs.teacher_head)
        total += settings.microbatches * (site.tokens_per_microbatch * per_token + settings.own_flops(site))
    return total
