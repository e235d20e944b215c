"""The recipe: every key, its type, its unit and why its default is what it is. Attribute names = YAML keys.

A section checks its own values; what needs two sections, the architecture or the world is in `checks.py`.
Values are strict: the text "8" is not a number and `true` is not 1. Unknown keys are errors.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from longred_megatron.layout import Parallel, Precision
from longred_megatron.rope import METHODS, Rope
from longred_megatron.settings import PositiveFloat, PositiveInt, RecipePath, Settings


class Model(Settings):
    """The model that is trained, and its longer window."""

    hf: RecipePath = Field(description="Hugging Face folder: architecture, tokenizer and initial weights")
    rope: Rope = Field(
        "none",
        validate_default=True,
        description=f"how RoPE is scaled: {', '.join(METHODS)}; left out: none, the source's own",
    )
    max_position_embeddings: PositiveInt = Field(description="target window, in tokens")


class Teacher(Settings):
    """The frozen model that the student is compared with; it keeps its own RoPE."""

    hf: RecipePath = Field(description="Hugging Face folder of the teacher; left out: model.hf")


class Step(Settings):
    """One micro-batch."""

    tokens_per_microbatch: PositiveInt = Field(
        description="tokens of a micro-batch, the same for all objectives: pipeline messages have one shape"
    )


class Objective(Settings):
    """What all objectives have in common."""

    microbatches: PositiveInt = Field(
        description="micro-batches of this objective per optimizer step, over all data-parallel replicas"
    )
    sequence_length: PositiveInt = Field(description="tokens of one sequence")
    data: str = Field(description="name of a data set of the section `data`")
    weight: PositiveFloat = Field(description="factor of this objective's loss in the step loss")
    context_parallel: PositiveInt | None = Field(
        None,
        description="1: each context rank holds whole sequences; left out: parallel.context ranks share each",
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the teacher."""
        return True


class LongText(Objective):
    """Next-token cross-entropy on long texts."""

    weight: PositiveFloat = Field(
        1.0,
        description="factor of the loss in the step loss; 1: the others are relative to it, LongReD Eq. 18",
    )

    @property
    def needs_teacher(self) -> bool:
        return False


class ShortToLong(Objective):
    """Last hidden state at skipped positions against the teacher's at natural ones (1 - cosine)."""

    positions: Literal["cream", "uniform", "natural"] = Field(
        description="how the student's positions spread over the target window"
    )


class ShortRestoration(Objective):
    """Hidden states of chosen layers against the teacher's on short texts (1 - cosine, layers summed)."""

    layers: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = Field(
        description="restored layers numbered as in Hugging Face hidden_states: 1 is the first layer's output"
    )


class PackedDistillation(Objective):
    """Next-token distributions against a long-context teacher's, on short texts packed into a long window.

    The token's loss is (1 - cross_entropy) x temperature^2 x divergence + cross_entropy x next-token cross-entropy.
    """

    weight: PositiveFloat = Field(1.0, description="factor of the loss in the step loss")
    direction: Literal["forward", "reverse", "jensen_shannon"] = Field(
        "forward", description="of the divergence; forward: KL(teacher || student), as in arXiv 2511.06719"
    )
    temperature: PositiveFloat = Field(1.0, description="divisor of both models' logits in the divergence")
    top_k: PositiveInt | None = Field(
        None, description="the teacher's k likeliest tokens, and one bucket for all others; null: every token"
    )
    cross_entropy: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of next-token cross-entropy in the loss; 1: no teacher"
    )
    mask_documents: bool = Field(False, description="whether a text of the pack sees only itself")
    restart_positions: bool = Field(
        False, description="whether each text's positions start at 0; false: they run on through the pack"
    )

    @property
    def needs_teacher(self) -> bool:
        return self.cross_entropy < 1


class Objectives(Settings):
    """What a step trains. At least one; null removes an inherited one."""

    long_text: LongText | None = Field(None, description="cross-entropy on long texts")
    short_to_long: ShortToLong | None = Field(None, description="distillation at skipped positions")
    short_restoration: ShortRestoration | None = Field(None, description="distillation of layers on short texts")
    packed_distillation: PackedDistillation | None = Field(
        None, description="distillation of logits on packed short texts"
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if not dict(self.items()):
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"needs at least one objective; add one of {names}")
        return self

    def items(self) -> Iterator[tuple[str, LongText | ShortToLong | ShortRestoration | PackedDistillation]]:
        """Name and settings of the objectives that are present, in the order of the schema."""
        for name in type(self).model_fields:
            settings = getattr(self, name)
            if settings is not None:
                yield name, settings


Blend = Annotated[dict[Annotated[str, Field(min_length=1)], PositiveFloat], Field(min_length=1)]
"""Prefix of an indexed token file (from tools/prepare_data.py) -> weight; weights need not sum to 1."""


class Optimizer(Settings):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = Field(description="peak learning rate")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="course of the learning rate after warm-up; LongReD: constant"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up from 0; LongReD: none")
    min_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="learning rate at the last step of cosine and linear"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="decoupled weight decay; default as in LongReD"
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field((0.9, 0.95), description="Adam's two decay rates; defaults as in LongReD")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon; default as in LongReD")
    clip_grad: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")


class Training(Settings):
    """Length of the run, and what it keeps."""

    steps: PositiveInt = Field(description="optimizer steps")
    seed: Annotated[int, Field(ge=0)] = Field(
        2024, description="seed of data order and skipped positions; default as in LongReD"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "full",
        description="what backward recomputes; full: least memory for about a third more FLOPs",
    )
    checkpoint_every_steps: PositiveInt = Field(
        64, description="steps between checkpoints; one is written after the last step in any case"
    )
    keep_checkpoints: PositiveInt = Field(
        3, description="newest checkpoints kept; more than one, so that a damaged one costs little"
    )
    hang_minutes: PositiveFloat = Field(
        30.0, description="without progress on a rank before the job ends, naming the rank that holds up the others"
    )


class Debug(Settings):
    """Aids for checking a run."""

    dump_microbatches: RecipePath | None = Field(
        None,
        description="folder for every micro-batch as safetensors, one file per step and replica; null: none",
    )


class Run(Settings):
    """Where the results go."""

    dir: RecipePath = Field(description="folder of metrics, checkpoints, export and report")


class Recipe(Settings):
    """A whole run. Made by `load_recipe`, which also makes the paths absolute."""

    model: Model = Field(description="the trained model")
    teacher: Teacher = Field(description="the frozen teacher; left out: the model of model.hf")
    step: Step = Field(description="the micro-batch")
    objectives: Objectives = Field(description="what a step trains")
    data: dict[str, Blend] = Field(description="data sets: name -> {prefix: weight}")
    parallel: Parallel = Field(Parallel(), description="layout over ranks")
    precision: Precision = Field(Precision(), description="number formats")
    optimizer: Optimizer = Field(description="AdamW and its schedule")
    training: Training = Field(description="length of the run")
    debug: Debug = Field(Debug(), description="aids for checking a run")
    run: Run = Field(description="where the results go")
    phases: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="parts of the run in order, each a mapping of changes to this recipe; see `phases_of`"
    )

    @model_validator(mode="before")
    @classmethod
    def _teacher_defaults_to_model(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            return values
        teacher = values.get("teacher", {})
        if not isinstance(teacher, dict) or "hf" in teacher or "hf" not in values["model"]:
            return values
        return {**values, "teacher": {**teacher, "hf": values["model"]["hf"]}}

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective compares with the teacher."""
        return any(settings.needs_teacher for _, settings in self.objectives.items())

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one optimizer step, over all objectives and replicas (M of the step loss)."""
        return sum(settings.microbatches for _, settings in self.objectives.items())
