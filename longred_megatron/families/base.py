"""What a model is (`Architecture`), and how the models of a family are read, computed and written (`Family`).

A family is one class in one module of this package, found because it is there. The rest of the program asks an
architecture, which asks its family; it knows no family's name.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch.nn.functional import silu

from longred_megatron.errors import UserError
from longred_megatron.families.weights import PaddedRows, Part, Rule, column_parallel, norm, row_parallel
from longred_megatron.rope.frequencies import frequency_problem, rope_types

Activation = Callable[[Any], Any]  # of a tensor, elementwise
FAMILIES: dict[str, "Family"] = {}
"""By model_type. A family is in it from the definition of its class on."""


class LayerActivations(NamedTuple):
    """Elements that one layer keeps of a token for the backward pass.

    `whole`: on every tensor rank (under sequence parallelism, of its tokens); `split`: over the tensor ranks; `mlp`:
    of `split`, what lies inside the MLP.
    """

    whole: int
    split: int
    mlp: int


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, a gated MLP and rotary attention.

    Sizes are counts of elements. `family` is config.json's model_type. `rope` is transformers' `rope_parameters`
    mapping. `vocab_size` counts the rows of the embedding, which may be more than the tokenizer's entries.
    Checkpoints store the fields by name: a new one needs a default that older checkpoints had.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: dict[str, Any] = field(hash=False)
    max_position_embeddings: int
    hidden_act: str = "silu"
    embedding_scale: float = 1.0  # what the embedding's output is multiplied by

    def megatron_settings(self) -> dict[str, Any]:
        """Megatron's TransformerConfig, as far as it depends on the family."""
        return self._family.megatron_settings(self)

    @property
    def rope_types(self) -> tuple[str, ...]:
        """The `rope_type`s that an exported model may have."""
        return self._family.rope_types()

    @property
    def embedding_name(self) -> str:
        """The embedding's tensor in a Hugging Face folder."""
        return f"{self._family.embedding}.weight"

    @property
    def head_name(self) -> str:
        """The head's tensor, which a folder of a model with a tied head may have or not."""
        return f"{self._family.head}.weight"

    def layer_rules(self, index: int = 0) -> list[Rule]:
        """The parameters of layer `index`, counted from 0 as in Hugging Face's names. All layers have the same."""
        return list(self._first_layer) if index == 0 else self._family.layer_rules(self, index)

    def outer_rules(self, local_rows: int = 0) -> list[Rule]:
        """The parameters outside the layers. A tied head (a copy on the last stage) reads the embedding.

        local_rows: of the vocabulary on each tensor rank.
        """
        return self._family.outer_rules(self, local_rows)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the Hugging Face model."""
        rules = self.outer_rules()
        rules += [rule for index in range(self.num_layers) for rule in self.layer_rules(index)]
        return {name: shape for rule in rules for name, shape in rule.huggingface.items()}

    def num_parameters(self) -> int:
        """Trainable parameters, each counted once (a tied head is the embedding)."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    def layer_parameters(self, parts: Collection[Part] | None = None) -> int:
        """Parameters of one layer, of these parts alone where they are given."""
        rules = [rule for rule in self.layer_rules() if parts is None or rule.part in parts]
        return sum(math.prod(shape) for rule in rules for shape in rule.huggingface.values())

    def forward_flops_per_token(self, depth: int, sequence_length: int, head: bool) -> float:
        """Two per multiply-add; causal attention sees half of the sequence on average.

        Args:
            depth: layers that run; head: whether the language-model head runs.
        """
        matrices = sum(math.prod(shape) for _, shape in self._matrices)
        # scores and weighted values
        attention = 2 * self.num_attention_heads * self.head_dim * sequence_length / 2
        return 2 * (depth * (matrices + attention) + head * self.hidden_size * self.vocab_size)

    def layer_activations(self) -> LayerActivations:
        """Input and output of each norm over the hidden size; what a product split by its output gives (queries, keys,
        values, gate, up), and what one split by its input takes (attention's output, the MLP's product).

        Attention scores are never kept (fused attention).
        """
        wide = (self.hidden_size,)
        num_norms = sum(rule.part == "norm" and wide in rule.huggingface.values() for rule in self.layer_rules())
        parts = [
            (rule.part, shape[rule.layout.split_dim])
            for rule, shape in self._matrices
            if rule.layout.split_dim is not None
        ]
        mlp = sum(width for part, width in parts if part == "mlp")
        return LayerActivations(2 * num_norms * self.hidden_size, sum(width for _, width in parts), mlp)

    @cached_property  # a search for layouts asks a thousand times
    def _first_layer(self) -> list[Rule]:
        return self._family.layer_rules(self, 0)

    @cached_property
    def _matrices(self) -> list[tuple[Rule, tuple[int, ...]]]:
        """The (output, input) matrices of one layer."""
        shapes = [(rule, shape) for rule in self.layer_rules() for shape in rule.huggingface.values()]
        return [(rule, shape) for rule, shape in shapes if len(shape) == 2]

    @property
    def _family(self) -> "Family":
        return find_family(self.family)


class Biases(NamedTuple):
    """Which of a layer's matrices have biases."""

    qkv: bool = False
    attention_output: bool = False
    mlp: bool = False


class Family:
    """The models of one `model_type`. A subclass with a `model_type` is a family and states its differences.

    What this class says is true of Llama without biases: RMSNorm before attention and before a gated MLP, rotary
    embedding of whole heads. Names are those of transformers' modules, which have a `weight` and may have a `bias`.
    """

    model_type: ClassVar[str]
    qk_norm: ClassVar[bool] = False
    """Whether queries and keys are normalised, head by head."""

    embedding: ClassVar[str] = "model.embed_tokens"
    final_norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"
    layers: ClassVar[str] = "model.layers"

    # Names within a layer. One name for several matrices: one tensor has their rows, one after another.
    attention_norm: ClassVar[str] = "input_layernorm"
    qkv: ClassVar[tuple[str, ...]] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_key_norms: ClassVar[tuple[str, str]] = ("self_attn.q_norm", "self_attn.k_norm")
    attention_output: ClassVar[str] = "self_attn.o_proj"
    mlp_norm: ClassVar[str] = "post_attention_layernorm"
    gate_up: ClassVar[tuple[str, ...]] = ("mlp.gate_proj", "mlp.up_proj")
    down: ClassVar[str] = "mlp.down_proj"

    def __init_subclass__(cls) -> None:
        if "model_type" in vars(cls):
            assert cls.model_type not in FAMILIES, f"two families have the model_type {cls.model_type}"
            FAMILIES[cls.model_type] = cls()

    def rope_types(self) -> tuple[str, ...]:
        """The `rope_type`s that transformers' config class of the family takes, and gives back unchanged."""
        return rope_types()

    def activations(self) -> Mapping[str, Activation]:
        """What config.json's `hidden_act` may be, and the function."""
        return {"silu": silu}

    def biases(self, config: Any) -> Biases:
        """Which matrices of the model have biases, of a transformers config."""
        return Biases()

    def limits_attention(self, config: Any) -> bool:
        """Whether a layer attends to less than the window."""
        return "sliding_attention" in (getattr(config, "layer_types", None) or ())

    def problems(self, config: Any) -> Iterator[str]:
        """What of the model of a transformers config cannot be represented exactly, as sentences."""
        if config.hidden_act not in self.activations():
            supported = " or ".join(map(repr, self.activations()))
            yield f"hidden_act {config.hidden_act!r:.60} is not supported, only {supported}"
        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type not in self.rope_types():
            yield f"rope_type {rope_type!r:.60} is not supported; supported are {', '.join(self.rope_types())}"
        if self.limits_attention(config):
            yield (
                f"sliding_window {getattr(config, 'sliding_window', None)} limits attention, which this project does "
                "not train; set it to null if the model is meant to attend to its whole window"
            )
        biases = self.biases(config)
        if biases.attention_output != biases.mlp:
            both = {"attention_bias": biases.attention_output, "mlp_bias": biases.mlp}
            yield (
                f"{both} is not supported: Megatron has one switch for the biases of the attention's output "
                "and of the MLP; set the other to true and add zero biases to the weights"
            )
        if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            yield "partial_rotary_factor must be 1"
        elif rope_type in self.rope_types():
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            parameters = {"rope_type": rope_type, **config.rope_parameters}
            if problem := frequency_problem(parameters, head_dim, config.max_position_embeddings):
                yield f"{problem}; correct the settings of RoPE"

    def architecture(self, config: Any) -> Architecture:
        """Of a transformers config without `problems`."""
        heads, biases = config.num_attention_heads, self.biases(config)
        return Architecture(
            family=self.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            norm_epsilon=config.rms_norm_eps,
            tied_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=biases.qkv,
            attention_output_bias=biases.attention_output,
            mlp_bias=biases.mlp,
            qk_norm=self.qk_norm,
            rope=dict(config.rope_parameters),
            max_position_embeddings=config.max_position_embeddings,
            hidden_act=config.hidden_act,
        )

    def megatron_settings(self, architecture: Architecture) -> dict[str, Any]:
        """What Megatron's TransformerConfig needs to compute the family. It has the last word over the sizes and the
        precision set elsewhere; `softmax_scale` is without YaRN's factor."""
        return {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": self.activations()[architecture.hidden_act],
            "add_bias_linear": architecture.mlp_bias,
            "add_qkv_bias": architecture.qkv_bias,
            "qk_layernorm": architecture.qk_norm,
            "softmax_scale": 1 / math.sqrt(architecture.head_dim),
        }

    def outer_rules(self, architecture: Architecture, local_rows: int) -> list[Rule]:
        """See `Architecture.outer_rules`."""
        a = architecture
        shape, rows = (a.vocab_size, a.hidden_size), PaddedRows(a.vocab_size, local_rows)
        head = a.embedding_name if a.tied_embeddings else a.head_name
        return [
            Rule(("embedding.word_embeddings.weight",), {a.embedding_name: shape}, rows, "embedding"),
            norm("decoder.final_layernorm.weight", name=self.final_norm, size=a.hidden_size),
            Rule(("output_layer.weight",), {head: shape}, rows, "embedding" if a.tied_embeddings else "head"),
        ]

    def layer_rules(self, architecture: Architecture, index: int) -> list[Rule]:
        """See `Architecture.layer_rules`."""
        a = architecture
        rules = [*self.norm_rules(a), *self.attention_rules(a), *self.mlp_rules(a)]
        return [rule.within(f"{self.layers}.{index}.") for rule in rules]

    def norm_rules(self, architecture: Architecture) -> Iterator[Rule]:
        """A layer's norms, with names within the layer."""
        hidden, head_dim = architecture.hidden_size, architecture.head_dim
        plain, fused = "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
        yield norm(plain, fused, name=self.attention_norm, size=hidden)
        plain, fused = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        yield norm(plain, fused, name=self.mlp_norm, size=hidden)
        if architecture.qk_norm:
            query, key = self.query_key_norms
            yield norm("self_attention.q_layernorm.weight", name=query, size=head_dim)
            yield norm("self_attention.k_layernorm.weight", name=key, size=head_dim)

    def attention_rules(self, architecture: Architecture) -> Iterator[Rule]:
        """A layer's attention, with names within the layer."""
        a, hidden, groups = architecture, architecture.hidden_size, architecture.num_kv_heads
        query, kv = a.num_attention_heads * a.head_dim, a.num_kv_heads * a.head_dim
        rows = (query, kv, kv)
        yield from column_parallel(
            "self_attention.linear_qkv", self.qkv, rows, hidden, "attention", bias=a.qkv_bias, groups=groups
        )
        yield from row_parallel(
            "self_attention.linear_proj",
            self.attention_output,
            (hidden, query),
            "attention",
            bias=a.attention_output_bias,
        )

    def mlp_rules(self, architecture: Architecture) -> Iterator[Rule]:
        """A layer's MLP, with names within the layer."""
        hidden, ffn, bias = architecture.hidden_size, architecture.intermediate_size, architecture.mlp_bias
        yield from column_parallel("mlp.linear_fc1", self.gate_up, (ffn, ffn), hidden, "mlp", bias=bias)
        yield from row_parallel("mlp.linear_fc2", self.down, (hidden, ffn), "mlp", bias=bias)


def find_family(model_type: Any) -> Family:
    """Raises UserError for a model_type that no family has."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r:.60} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
