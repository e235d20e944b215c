from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longred_megatron.analysis import walk as module
from longred_megatron.analysis.network import Network
from longred_megatron.analysis.walk import walk
from longred_megatron.kernels.attention_divergence import attention_divergence
from longred_megatron.rope import METHODS, RopeSource
from tests.checkpoint.small_models import ONE_OF_EACH_FAMILY, edit_json, write_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 101, (2, 37), generator=torch.Generator().manual_seed(5))


def reference(folder: Path, positions: torch.Tensor | None = None, tokens: torch.Tensor = TOKENS) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    mask = torch.ones_like(tokens)  # or jumps in the positions would be borders of documents
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True,
                     output_attentions=True)  # fmt: skip


def hidden_states(network: Network, tokens: torch.Tensor, **more: Any) -> list[torch.Tensor]:
    """[texts, tokens, hidden] of each layer."""
    found: list[list[torch.Tensor]] = [[] for _ in range(network.architecture.num_layers)]
    for each in walk(network, tokens, **more):
        found[each.layer - 1].append(each.hidden)
    return [torch.cat(pieces).unflatten(0, tokens.shape) for pieces in found]


@pytest.mark.parametrize("piece", [37, 8, 6])
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
@torch.no_grad()
def test_it_is_the_model_of_transformers(
    name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", piece)
    folder = write_model(name, tmp_path)
    positions = torch.arange(37) + 20 * (torch.arange(37) >= 9)
    plain = reference(folder, positions[None])
    walked = list(product(range(1, 5), range(2), range(0, 37, piece)))
    for place, each in zip(walked, walk(Network(folder, torch.float32, CPU), TOKENS, positions), strict=True):
        assert place == (each.layer, each.text, each.start)
        hidden = plain.hidden_states[each.layer][each.text, each.tokens]
        torch.testing.assert_close(each.hidden, hidden, rtol=1e-4, atol=1e-5)
        key = torch.cat(list(each.keys()), dim=1)
        torch.testing.assert_close(key[:, each.start :], each.key, rtol=0, atol=0)
        scores = each.scale * each.query @ key.repeat_interleave(len(each.query) // len(key), 0).transpose(1, 2)
        unseen = torch.arange(key.shape[1]) > torch.arange(37)[each.tokens, None]
        probabilities = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        expected = plain.attentions[each.layer - 1][each.text, :, each.tokens, : key.shape[1]]
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pieces_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(write_model("llama_3", tmp_path), torch.float32, CPU)
    wholes = list(walk(network, TOKENS))
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    pieces = walk(network, TOKENS)
    for whole in wholes:
        for start, stop in ((0, 16), (16, 32), (32, 37)):
            piece = next(pieces)
            assert (piece.layer, piece.text, piece.tokens) == (whole.layer, whole.text, slice(start, stop))
            torch.testing.assert_close(piece.hidden, whole.hidden[start:stop], rtol=1e-4, atol=1e-5)
            for what in ("query", "key", "value"):
                x, y = (each.before_rope(what) for each in (piece, whole))
                torch.testing.assert_close(x, y[:, start:stop], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [{"method": "pi"}, {"method": "abf", "theta": 1e7}, {"method": "yarn"},
                                    {"method": "dynamic"}])  # fmt: skip
@torch.no_grad()
def test_another_rope_is_the_exported_models(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 40)  # no piece reaches past the window by its own length
    folder = write_model("llama_3", tmp_path)
    network = Network(folder, torch.float32, CPU)
    long = torch.randint(0, 101, (1, 150), generator=torch.Generator().manual_seed(6))  # past the window of 64
    before = hidden_states(network, long)
    source = RopeSource(dict(network.config.rope_parameters), 8, 64, 256)
    chosen = METHODS[method["method"]].model_validate(method)
    rope, window = chosen.extended(source), chosen.max_position_embeddings(source)
    layers = hidden_states(network, long, rotary=network.rotary(rope, window))
    edit_json(folder / "config.json", rope_parameters=rope, max_position_embeddings=window)
    plain = reference(folder, tokens=long)
    for ours, theirs in zip(layers, plain.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[0], layers[0])
    assert torch.equal(before[3], hidden_states(network, long)[3])  # the network is as it was


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
@torch.no_grad()
def test_drift_is_that_of_output_attentions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    folder = write_model(name, tmp_path)
    network = Network(folder, torch.float32, CPU)
    rope = network.config.rope_parameters | {"rope_theta": 1e8}
    walks = (walk(network, TOKENS, rotary=rotary) for rotary in (None, network.rotary(rope)))
    found: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for a, b in zip(*walks, strict=True):  # two walks of one network, in turns
        drift = attention_divergence(a.query, a.keys(), b.query, b.keys(), a.scale, b.scale, a.start)
        found[a.layer - 1].append(drift)
    before = reference(folder).attentions
    edit_json(folder / "config.json", rope_parameters=rope, pad_token_id=0)  # Phi-3 has a default
    for pieces, p, q in zip(found, before, reference(folder).attentions, strict=True):
        plain = (p.double() * (p.double().log() - q.double().log())).nan_to_num(0).sum(-1)
        drift = torch.cat([torch.cat(pieces[i : i + 3], dim=1)[None] for i in (0, 3)])
        torch.testing.assert_close(drift, plain, rtol=1e-3, atol=1e-5)
        assert plain.mean() > 1e-4
