"""Values inside a layer's attention, computed a second time from the layer's input.

Nothing is kept by a module while it runs, so that recomputation and any number of micro-batches in flight stay right;
the price is the layer's norm and projection once more, and for an attention output the attention.
"""

from collections.abc import Collection
from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor

from longred_megatron.model.attention import SequenceLayout


def attention_values(
    layer: Any,
    hidden: Tensor,
    wanted: Collection[str],
    rotary_table: Tensor | None,
    attention_factor: float,
    layout: SequenceLayout,
) -> dict[str, Tensor]:
    """What `objectives.base.Tap` can name of one Megatron transformer layer, by its `what`.

    Args:
        hidden: the layer's input, [tokens, 1, hidden] (tokens split over the tensor ranks under sequence parallelism).
        wanted: of query, key, value and attention_output.
        rotary_table: None where attention turns queries and keys itself, by `layout.rotation`.
        attention_factor: YaRN's, which the model applies to the softmax scale instead of to queries and keys.

    Returns:
        query, key, value: [tokens, 1, heads or kv_heads / tensor, head_dim], all tokens of the context rank, after
        RoPE and any norm of heads, as in transformers; attention_output: as `hidden`.
    """
    attention = layer.self_attention
    normed = layer.input_layernorm(hidden)  # on a GPU an identity: the norm is part of the projection there
    values: dict[str, Tensor] = {}
    if "attention_output" in wanted:
        output, bias = attention(normed, attention_mask=None, rotary_pos_emb=rotary_table, packed_seq_params=layout)
        values["attention_output"] = output if bias is None else output + bias
    if set(wanted) - {"attention_output"}:
        query, key, value = attention.get_query_key_value_tensors(normed, None)
        for name, x in (("query", query), ("key", key)):
            if layout.rotation is not None:
                turned = layout.rotation.turn(x, x.dtype)
            else:
                turned = apply_rotary_pos_emb(x, rotary_table, config=attention.config)
            values[name] = turned if attention_factor == 1 else turned * attention_factor
        values["value"] = value
    return {what: values[what] for what in wanted}
