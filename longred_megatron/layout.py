"""How one replica of a model is cut over ranks."""

from functools import cache
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, model_validator

from longred_megatron.settings import NumRanks, PositiveInt, Settings, renamed


class Parallel(Settings):
    """How one model replica is cut; data parallelism takes what is left of the world."""

    tensor: NumRanks = Field(1, description="ranks that share each layer's matrices")
    pipeline: NumRanks = Field(1, description="pipeline stages")
    virtual_pipeline: Annotated[int, Field(ge=2, le=256)] | None = Field(
        None, description="model chunks per pipeline stage (interleaved schedule); null: one"
    )
    layers_per_chunk: Annotated[tuple[PositiveInt, ...], Field(strict=False, max_length=4096)] | None = Field(
        None, description="layers of each of the pipeline x virtual_pipeline chunks, in order; null: equally many"
    )
    context: NumRanks = Field(1, description="ranks that share each micro-batch's tokens")
    sequence: bool = Field(False, description="Megatron's sequence parallelism; needs tensor > 1")
    overlap_param_gather: bool = Field(
        False, description="data-parallel ranks exchange updated weights while the next step begins; not tried on GPUs"
    )
    tp_comm_overlap: bool = Field(
        False,
        description="tensor ranks exchange tokens while the student's products run (Transformer Engine's Userbuffers); "
        "needs sequence, a GPU and no FP8; not tried on GPUs",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: Any) -> Any:
        return renamed(values, "layers_per_stage", "layers_per_chunk")

    @property
    def num_chunks(self) -> int:
        """Pipeline stages times the model chunks on each. Chunk i lies on stage i mod `pipeline`."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def of_teacher(self, num_layers: int) -> "Parallel":
        """For a frozen model of `num_layers` layers. Its widths are not those that the student's buffers have."""
        return self.for_depth(num_layers).model_copy(update={"tp_comm_overlap": False})

    def for_depth(self, num_layers: int) -> "Parallel":
        """The same stages for a model of `num_layers` layers, split by its own depth, as evenly as it goes."""
        chunks = self.num_chunks
        if num_layers == sum(self.layers_per_chunk or (0,)) or (not self.layers_per_chunk and num_layers % chunks == 0):
            return self
        sizes = tuple((i + 1) * num_layers // chunks - i * num_layers // chunks for i in range(chunks))
        return self.model_copy(update={"layers_per_chunk": sizes})

    def chunk_layers(self, num_layers: int) -> list[range]:
        """The layer numbers (from 1) of each chunk."""
        return list(_ranges(self.layers_per_chunk or (num_layers // self.num_chunks,) * self.num_chunks))

    def layer_stages(self, num_layers: int) -> dict[int, int]:
        """{layer number: the pipeline stage it lies on, from 0}."""
        chunks = enumerate(self.chunk_layers(num_layers))
        return {layer: chunk % self.pipeline for chunk, layers in chunks for layer in layers}


@cache  # a search for layouts asks a hundred thousand times
def _ranges(sizes: tuple[int, ...]) -> list[range]:
    """From 1, one after another."""
    return [range(end - size + 1, end + 1) for size, end in zip(sizes, accumulate(sizes), strict=True)]
