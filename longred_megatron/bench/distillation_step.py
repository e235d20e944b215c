"""The logit distillation step: this engine against plain Megatron-Core, and against its own next-token step."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from longred_megatron.bench.base import TOLERANCES, Case, Comparison, Sizes, Start, formats
from longred_megatron.bench.engine import EngineStep
from longred_megatron.bench.inputs import phase_of, step_tokens, write_microbatches, write_recipe
from longred_megatron.bench.megatron import MegatronStep
from longred_megatron.planning.flops import step_flops


class DistillationStep(Comparison):
    """A step of packed_distillation against two GPTModels and KL of their logits; and against our next_token step."""

    name = "distillation_step"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        objective = {"microbatches": sizes.twin_microbatches, "sequence_length": sizes.sequence_length}
        for params in formats():
            recipe = write_recipe(folder, sizes, {"packed_distillation": objective}, sizes.twin_layers, params)
            twin = write_recipe(folder, sizes, {"next_token": objective}, sizes.twin_layers, params)
            phase = phase_of(recipe)
            flops = step_flops(phase)
            references: dict[str, tuple[Start, float]] = {
                "": (partial(MegatronStep, recipe, write_microbatches(phase, folder)), flops),
                ", against our next_token": (partial(EngineStep, twin), step_flops(phase_of(twin))),
            }
            for against, (reference, reference_flops) in references.items():
                yield Case(
                    f"{sizes.twin_layers} layers of {sizes.hidden_size}, {params}{against}",
                    partial(EngineStep, recipe),
                    reference,
                    step_tokens(phase),
                    "tokens",
                    flops,
                    params,
                    TOLERANCES[params] if not against else float("inf"),  # another loss
                    reference_flops=reference_flops,
                )
