"""The next-token step: this engine against plain Megatron-Core."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from longred_megatron.bench.base import TOLERANCES, Case, Comparison, Sizes, formats
from longred_megatron.bench.engine import EngineStep
from longred_megatron.bench.inputs import phase_of, step_tokens, write_microbatches, write_recipe
from longred_megatron.bench.megatron import MegatronStep
from longred_megatron.planning.flops import step_flops


class CrossEntropyStep(Comparison):
    """A step of the objective next_token against Megatron-Core's GPTModel with its own cross-entropy."""

    name = "cross_entropy_step"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        objective = {"microbatches": sizes.twin_microbatches, "sequence_length": sizes.sequence_length}
        for params in formats():
            recipe = write_recipe(folder, sizes, {"next_token": objective}, sizes.twin_layers, params)
            phase = phase_of(recipe)
            yield Case(
                f"{sizes.twin_layers} layers of {sizes.hidden_size}, {params}",
                partial(EngineStep, recipe),
                partial(MegatronStep, recipe, write_microbatches(phase, folder)),
                step_tokens(phase),
                "tokens",
                step_flops(phase),
                params,
                TOLERANCES[params],
            )
