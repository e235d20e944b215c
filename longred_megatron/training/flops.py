"""Floating-point operations a training step needs, for model FLOPs utilization."""

from longred_megatron.families import Architecture
from longred_megatron.recipe import Phase


def forward_flops_per_token(architecture: Architecture, depth: int, sequence_length: int, head: bool) -> float:
    """Two per multiply-add; causal attention sees half of the sequence on average.

    Args:
        depth: layers that run; head: whether the language-model head runs.
    """
    a = architecture
    query, kv = a.num_attention_heads * a.head_dim, a.num_kv_heads * a.head_dim
    matrices = a.hidden_size * (2 * query + 2 * kv + 3 * a.intermediate_size)
    attention = 2 * query * sequence_length / 2  # scores and weighted values
    return 2 * (depth * (matrices + attention) + head * a.hidden_size * a.vocab_size)


def step_flops(phase: Phase) -> float:
    """Of one optimizer step over all ranks: the student's forward and backward (twice the forward), the teachers'
    forward, and what losses take beside both. Recomputed activations do not count: they are a choice, not part of the
    model."""
    total, source = 0.0, phase.source
    for name, settings in phase.recipe.objectives.items():
        needs, site, length = phase.needs[name], phase.sites[name], settings.sequence_length
        per_token = 3 * forward_flops_per_token(source, source.num_layers, length, needs.student_head)
        if needs.teacher:
            depth = needs.teacher_depth(site.teacher.num_layers)
            per_token += forward_flops_per_token(site.teacher, depth, length, needs.teacher_head)
        total += settings.microbatches * (site.tokens_per_microbatch * per_token + settings.own_flops(site))
    return total
