"""Number formats: what can be asked for in a recipe, and what of FP8 the card, cuDNN and Transformer Engine refuse.

Transformer Engine refuses at the first forward pass, after the weights have been loaded, or takes another way without a
message. Here it is said before anything starts. Rules and versions are those of Transformer Engine 2.20
(`get_attention_backend`, `check_fp8_support` and its kin); tests/gpu_path asks it row by row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from longred_megatron.errors import listed, multiples
from longred_megatron.settings import Mark, Settings

Scaling = Literal["tensorwise", "blockwise", "mxfp8", "delayed"]
ATTENTION_NOTE = (
    "attention in FP8: one scale for all tokens of a tensor, so masked future tokens change the rounding of earlier "
    "ones (Transformer Engine's issue 3248); compare a run's losses with bf16 before you rely on it"
)


@dataclass(frozen=True)
class Card:
    """What decides about FP8 on a machine: the card's compute capability, and the versions of cuDNN and CUDA."""

    capability: tuple[int, int]
    cudnn: tuple[int, int, int]
    cuda: tuple[int, int]

    @classmethod
    def here(cls) -> Self:
        """This process's GPU."""
        import torch

        number = torch.backends.cudnn.version() or 0  # 92000 is 9.20.0
        major, minor = (torch.version.cuda or "0.0").split(".")[:2]
        cudnn = (number // 10000, number // 100 % 100, number % 100)
        return cls(torch.cuda.get_device_capability(), cudnn, (int(major), int(minor)))

    @property
    def name(self) -> str:
        return f"a GPU of compute capability {self.capability[0]}.{self.capability[1]}"


HOPPER = Card((9, 0), (9, 20, 0), (13, 0))
BLACKWELL = Card((10, 0), (9, 21, 0), (13, 0))


@dataclass(frozen=True)
class Sizes:
    """What FP8 products and attention are made of, on one rank.

    rank_tokens: rows of a product. widths: a product's inner size by its name. head_dims: by the model's name.
    """

    rank_tokens: int
    widths: Mapping[str, int]
    head_dims: Mapping[str, int]


GRADIENT_BYTES = 4  # summed over micro-batches in fp32, whatever the parameters' type


class Precision(Settings):
    """Number formats."""

    params: Literal["bf16", "fp32"] = Field(
        "bf16", description="parameters and arithmetic; with bf16 the optimizer keeps fp32 copies; fp32 needs a CPU"
    )
    fp8: Annotated[Literal["hybrid", "e4m3"] | None, Mark.PHASE] = Field(
        None, description="FP8 matrix products of the student's layers; hybrid: e5m2 for gradients; null: none"
    )
    fp8_recipe: Annotated[Scaling | None, Mark.PHASE] = Field(
        None,
        description="how FP8 numbers are scaled: tensorwise, blockwise, mxfp8 (from each tensor itself), or delayed "
        "(from the steps before: the only one for FP8 attention on Hopper); null: tensorwise, or delayed with "
        "fp8_attention",
    )
    fp8_attention: Annotated[bool, Mark.PHASE] = Field(
        False,
        description="FP8 attention as well; needs fp8. Masked future tokens change the rounding of earlier ones "
        "(Transformer Engine's issue 3248)",
    )
    teacher_fp8: Annotated[bool, Mark.PHASE] = Field(
        False, description="teachers in FP8 too; false: in the format of params, so that targets have no FP8 noise"
    )

    @property
    def scaling(self) -> Scaling | None:
        """The FP8 recipe that is used; None without FP8.

        By default a stateless one: nothing has to be warmed up or saved, and no cast uses a scale nobody has set.
        """
        if self.fp8 is None:
            return None
        return self.fp8_recipe or ("delayed" if self.fp8_attention else "tensorwise")

    @property
    def number_bytes(self) -> int:
        """Of a parameter or an activation."""
        return 2 if self.params == "bf16" else 4

    @property
    def optimizer_bytes(self) -> int:
        """Of a trained parameter in Adam's state: two fp32 moments, and of bf16 parameters an fp32 copy."""
        return 12 if self.params == "bf16" else 8

    @property
    def fp8_weight_bytes(self) -> float:
        """Kept beside an element of a layer's matrix from one step's first micro-batch on, so that the others need no
        cast: its FP8 number, one more for the transposed matrix, and with mxfp8 a byte of scale for 32 of each.

        On Blackwell, tensorwise and delayed scaling make no transposed one. (Transformer Engine's `_fp8_workspaces`.)
        """
        return 0.0 if self.fp8 is None else 2 * (1 + (self.scaling == "mxfp8") / 32)

    @property
    def kept_input_bytes(self) -> float:
        """Kept of a number that enters a layer's matrix product, for its backward pass: in FP8 that number, and a scale
        of four bytes for 128 (blockwise) or of one for 32 (mxfp8)."""
        return self.number_bytes if self.fp8 is None else 1 + (self.scaling in ("blockwise", "mxfp8")) / 32

    @property
    def kept_copy_bytes(self) -> int:
        """Kept beside each number of attention's output: with delayed scaling the projection's own FP8 number. The
        other recipes make it again (Megatron's `save_original_input`)."""
        return int(self.scaling == "delayed")

    @property
    def kept_attention_bytes(self) -> tuple[float, float]:
        """Kept of a number that attention takes, and of one that it gives. In FP8: of queries, keys and values the FP8
        number, with mxfp8 one more and the scales for the other direction; of the output with delayed scaling alone."""
        if not self.fp8_attention:
            return self.number_bytes, self.number_bytes
        taken = 2 * (1 + 1 / 32) if self.scaling == "mxfp8" else 1
        return taken, 1 if self.scaling == "delayed" else self.number_bytes

    def of_teacher(self) -> "Precision":
        """Of the frozen models."""
        return self if self.teacher_fp8 else self.without_fp8()

    def without_fp8(self) -> "Precision":
        return Precision(params=self.params)

    def megatron_settings(self) -> dict[str, Any]:
        """The keys of Megatron's TransformerConfig."""
        if self.fp8 is None:
            return {}
        settings: dict[str, Any] = {
            "fp8": self.fp8,
            "fp8_recipe": self.scaling,
            "fp8_dot_product_attention": self.fp8_attention,
        }
        if self.scaling == "delayed":
            # Transformer Engine's own default. Megatron's, the last step alone, lets one quiet step overflow the next.
            settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        return settings

    def problems(self, sizes: Sizes, card: Card | None) -> Iterator[str]:
        """What is wrong with these formats, each a sentence.

        card: None if it is not known: then the one that the settings are made for, Hopper or Blackwell.
        """
        if self.fp8 is None:
            for key in ("fp8_recipe", "fp8_attention", "teacher_fp8"):
                if value := getattr(self, key):
                    shown = "true" if value is True else repr(value)
                    yield f"`precision.{key}` is {shown}: has no effect without `precision.fp8`; set that to hybrid"
            return
        if self.params == "fp32":
            yield "`precision.params` is 'fp32': FP8 products and attention take bf16; set it to bf16, or fp8 to null"
        if self.teacher_fp8 and self.scaling == "delayed":
            yield (
                "`precision.teacher_fp8` is true: with delayed scaling a teacher's scales are never set, since it has "
                "no training steps; set it to false, or `precision.fp8_recipe` to tensorwise"
            )
        card = card or self._usual_card
        yield from self._size_problems(sizes)
        yield from self._product_problems(card)
        if self.fp8_attention:
            yield from self._attention_problems(sizes.head_dims, card)

    @property
    def _usual_card(self) -> Card:
        needs_blackwell = self.scaling == "mxfp8" or (self.fp8_attention and self.scaling != "delayed")
        return BLACKWELL if needs_blackwell else HOPPER

    def _size_problems(self, sizes: Sizes) -> Iterator[str]:
        multiple = 32 if self.scaling == "mxfp8" else 16
        if sizes.rank_tokens % multiple:
            yield (
                f"`precision.fp8` is {self.fp8!r}: a rank holds {sizes.rank_tokens} tokens of a micro-batch, and FP8 "
                f"products ({self.scaling}) take multiples of {multiple}; change `step.tokens_per_microbatch` or the "
                f"ranks it is divided over, so that each holds {multiples(sizes.rank_tokens, multiple)}"
            )
        odd = [f"{name} {width}" for name, width in sizes.widths.items() if width % multiple]
        if odd:
            yield (
                f"`precision.fp8` is {self.fp8!r}: {listed(odd)} on a rank, and FP8 products ({self.scaling}) take "
                f"multiples of {multiple}; lower `parallel.tensor`, or set fp8 to null"
            )

    def _product_problems(self, card: Card) -> Iterator[str]:
        where = f"`precision.fp8_recipe` {self.scaling}"
        if card.capability < (8, 9):
            yield f"`precision.fp8` is {self.fp8!r}: needs 8.9 or newer, and this is {card.name}; set it to null"
        elif self.scaling == "mxfp8" and not (10, 0) <= card.capability < (12, 0):
            yield f"{where} needs Blackwell (10.0 to 11.x), and this is {card.name}; use tensorwise"
        elif self.scaling == "blockwise" and (card.capability < (9, 0) or card.cuda < (12, 9)):
            yield (
                f"{where} needs Hopper or newer and CUDA 12.9, and this is {card.name} with CUDA "
                f"{card.cuda[0]}.{card.cuda[1]}; use tensorwise"
            )

    def _attention_problems(self, head_dims: Mapping[str, int], card: Card) -> Iterator[str]:
        on_blackwell = (10, 0) <= card.capability < (12, 0)
        cudnn = ".".join(map(str, card.cudnn))
        key, off = "`precision.fp8_attention` is true", "set fp8_attention to false"
        if self.scaling == "blockwise":
            yield f"{key}: there is none with blockwise scaling, it would be left in bf16 without a message; {off}"
        elif not (card.capability == (9, 0) or on_blackwell):
            yield f"{key}: is for Hopper (9.0) and Blackwell (10.x), and this is {card.name}; {off}"
        elif self.scaling != "delayed" and not on_blackwell:
            yield f"{key}: {self.scaling} scaling needs Blackwell for it, this is {card.name}; use delayed, or {off}"
        elif self.scaling == "mxfp8" and (card.cudnn < (9, 21, 0) or card.cudnn in ((9, 23, 0), (9, 23, 1))):
            yield f"{key}: with mxfp8 it needs cuDNN 9.21 (not 9.23.0 or 9.23.1), and there is {cudnn}; {off}"
        elif card.cudnn < ((9, 14, 0) if self.scaling == "tensorwise" else (9, 7, 0)) or card.cudnn == (9, 10, 0):
            yield f"{key}: with {self.scaling} scaling it needs a newer cuDNN than {cudnn}; install 9.14 or newer"
        for whose, head_dim in head_dims.items():
            if card.capability < (10, 0) and head_dim != 128:
                yield f"{key}: to train on Hopper, heads must have 128 dims, those of {whose} have {head_dim}; {off}"
            elif head_dim > 128 or head_dim % 16:
                yield f"{key}: heads must have a multiple of 16 dims up to 128, {whose} has {head_dim}; {off}"
