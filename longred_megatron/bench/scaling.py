"""What this engine's LongReD step costs by sequence length, compared layers and ranks, against its plainest setting."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from longred_megatron.bench.base import TOLERANCES, Case, Comparison, Sizes, formats
from longred_megatron.bench.engine import EngineStep
from longred_megatron.bench.inputs import longred_objectives, longred_recipe, phase_of, step_tokens
from longred_megatron.device import on_gpu
from longred_megatron.planning.flops import step_flops
from longred_megatron.recipe.auto_layers import spread

AXES = {
    "tensor": ("parallel.tensor={n}",),
    "pipeline": ("parallel.pipeline={n}",),
    "context": ("parallel.context={n}",),
    "data": (),
}


class Scaling(Comparison):
    """Our LongReD step at other lengths, compared layers and ranks, against one rank at the given length."""

    name = "scaling"

    def cases(self, sizes: Sizes, folder: Path) -> Iterator[Case]:
        layers, params = sizes.twin_layers, formats()[0]
        sizes = sizes.model_copy(update={"microbatches": (2, 1, 1)})  # a replica of 4 has one each
        recipe = longred_recipe(folder, sizes, longred_objectives(sizes, layers), layers, params)

        base = phase_of(recipe)

        def case(setting: str, *overrides: str, ranks: int = 1, same: bool = True) -> Case:
            phase = phase_of(recipe, *overrides)
            return Case(
                f"{setting}, {params}",
                partial(EngineStep, recipe, *overrides),
                partial(EngineStep, recipe),
                step_tokens(phase),
                "tokens",
                step_flops(phase),
                params,
                TOLERANCES[params] if same else float("inf"),
                ranks,
                step_tokens(base),
                step_flops(base),
            )

        given = sizes.sequence_length
        for length in (given // 2, 2 * given, 4 * given):
            yield case(f"sequences of {length}", *_of_length(length), same=False)
        for compared in sorted({1, layers // 2, layers}):
            chosen = spread(compared, layers)
            yield case(f"{compared} compared layers", f"objectives.short_restoration.layers={list(chosen)}", same=False)
        for ranks in sizes.ranks:
            if on_gpu() and ranks > torch.cuda.device_count():
                continue
            for axis, overrides in AXES.items():
                if axis != "tensor" or (sizes.heads % ranks == 0 and sizes.kv_heads % ranks == 0):
                    yield case(f"{axis} {ranks}", *(each.format(n=ranks) for each in overrides), ranks=ranks)


def _of_length(length: int) -> tuple[str, ...]:
    """All sequences as much longer or shorter as the long ones."""
    return (
        f"step.tokens_per_microbatch={length}",
        f"model.max_position_embeddings={length}",
        f"objectives.long_text.sequence_length={length}",
        f"objectives.short_to_long.sequence_length={length // 4}",
        f"objectives.short_restoration.sequence_length={length // 8}",
    )
