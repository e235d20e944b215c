"""Layouts of rows and columns, each against a few lines of plain torch."""

import pytest
import torch

from longred_megatron.families.weights import (
    Columns,
    FusedRows,
    PaddedRows,
    Replicated,
    Rows,
    column_parallel,
    row_parallel,
)


def test_query_key_value_lie_group_by_group():
    heads, kv_heads, head_dim, hidden = 4, 2, 3, 5
    q, k, v = (torch.randn(n * head_dim, hidden) for n in (heads, kv_heads, kv_heads))
    rows = Rows((len(q), len(k), len(v)), groups=kv_heads)
    # Group g: query heads 2g and 2g + 1, key head g, value head g.
    expected = torch.cat([q[:6], k[:3], v[:3], q[6:], k[3:], v[3:]])
    assert torch.equal(rows.split([q, k, v], 0, 1), expected)
    assert torch.equal(rows.split([q, k, v], 1, 2), expected[12:])
    bias = Rows((12, 6, 6), groups=kv_heads).split([q[:, 0], k[:, 0], v[:, 0]], 0, 1)
    assert torch.equal(bias, expected[:, 0])


def test_gate_and_up_are_paired_on_each_rank():
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    assert torch.equal(Rows((8, 8)).split([gate, up], 0, 1), torch.cat([gate, up]))
    assert torch.equal(Rows((8, 8)).split([gate, up], 1, 2), torch.cat([gate[4:], up[4:]]))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("rows", "groups"), [((12, 6, 6), 2), ((8, 8), None)])
def test_one_tensor_of_all_rows_is_taken_apart(rows, groups, size):
    fused = torch.randn(sum(rows), 3)
    blocks = list(fused.split(rows))
    shards = [FusedRows(rows, groups).split([fused], rank, size) for rank in range(size)]
    assert all(torch.equal(s, Rows(rows, groups).split(blocks, rank, size)) for rank, s in enumerate(shards))
    [back] = FusedRows(rows, groups).join(shards)
    assert torch.equal(back, fused)


def test_columns_are_cut_in_order():
    weight = torch.randn(3, 8)
    assert torch.equal(Columns(8).split([weight], 1, 2), weight[:, 4:])


def test_replicated_tensors_are_whole_on_every_rank():
    norm = torch.randn(8)
    assert all(torch.equal(Replicated().split([norm], rank, 2), norm) for rank in range(2))


def test_padding_rows_are_zero_and_dropped_again():
    table = torch.randn(5, 2)
    rows = PaddedRows(5, local=2)
    shards = [rows.split([table], rank, 4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [2, 2, 2, 2]
    assert torch.equal(torch.cat(shards), torch.cat([table, torch.zeros(3, 2)]))
    assert torch.equal(rows.join(shards)[0], table)


def test_a_table_longer_than_the_ranks_hold_is_cut_off():
    """A teacher's vocabulary may be padded further than the student's, by whose rows both are cut."""
    table = torch.randn(9, 2)
    shards = [PaddedRows(9, local=2).split([table], rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(shards), table[:6])


def test_the_rules_of_a_product():
    weight, bias = column_parallel("fc1", ("gate", "up"), (8, 8), 3, "mlp", bias=True)
    assert (weight.megatron, weight.huggingface) == (("fc1.weight",), {"gate.weight": (8, 3), "up.weight": (8, 3)})
    assert (bias.megatron, bias.huggingface) == (("fc1.bias",), {"gate.bias": (8,), "up.bias": (8,)})
    [fused] = column_parallel("fc1", ("both",), (8, 8), 3, "mlp", bias=False)
    assert fused.huggingface == {"both.weight": (16, 3)}
    weight, bias = row_parallel("fc2", "down", (3, 8), "mlp", bias=True)
    assert (weight.huggingface, bias.huggingface) == ({"down.weight": (3, 8)}, {"down.bias": (3,)})
    assert bias.layout == Replicated()
    assert list(weight.within("layers.2.").huggingface) == ["layers.2.down.weight"]
    with pytest.raises(ValueError, match="shorter"):  # two names for three matrices
        list(column_parallel("qkv", ("q", "kv"), (8, 4, 4), 3, "attention", bias=False))
