"""The studies of tools/analyze.py against plain transformers, on tiny models."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from longred_megatron.analysis import drift
from longred_megatron.analysis.inputs import Model
from longred_megatron.analysis.measure import Drift
from longred_megatron.errors import UserError
from tests.checkpoint.small_models import edit_json, write_model
from tests.training.workspace import make_workspace
from tools.analyze import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `teacher`, which is near it."""
    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    return folder


def run(study: str, folder: Path, output: Path, *arguments: str, hf: tuple[str, ...] = ("model", "teacher")) -> Any:
    models = [str(folder / name) for name in hf]
    main([study, "--hf", *models, "--output", str(output), "--text", str(folder / "texts"), *arguments])
    tokens = load_file(output / "tokens.safetensors")["tokens"]
    page = (output / "report.html").read_text()
    assert "prefers-color-scheme" in page and page.count("<svg") == page.count("<figcaption>") > 0
    assert "http" not in page.replace("http://www.w3.org", "")
    return json.loads((output / "results.json").read_text()), tokens


def plain(folder: Path, tokens: Tensor, positions: Tensor | None = None, **rope: float) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters |= rope
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    mask = torch.ones_like(tokens)  # or jumps in the positions would be borders of documents
    with torch.no_grad():
        out = model(
            tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True, output_attentions=True
        )
    return model, out


def test_models_are_named_by_what_tells_them_apart(folder: Path, tmp_path: Path) -> None:
    for run_name in ("a/seed-1", "b/seed-1"):
        (tmp_path / run_name).mkdir(parents=True)
        (tmp_path / run_name / "hf").symlink_to(folder / "teacher")
    hf = (str(folder / "model"), str(tmp_path / "a/seed-1/hf"), str(tmp_path / "b/seed-1/hf"))
    results, _ = run("drift", folder, tmp_path / "output", "--texts", "1", "--length", "16", hf=hf)
    assert [model["name"] for model in results["models"]] == ["a/seed-1", "b/seed-1"]


def test_drift_is_that_of_plain_attentions(folder: Path, tmp_path: Path) -> None:
    scores = ("--scores", "60", "57", "60")
    arguments = ("--texts", "3", "--length", "40", "--short", "16", *scores)
    results, tokens = run("drift", folder, tmp_path / "out", *arguments, hf=("model", "teacher", "model"))
    assert tokens.shape == (3, 40) and [each["score_kept"] for each in results["models"]] == [0.95, 1.0]
    other, itself = (each["drift"] for each in results["models"])
    assert set(itself) == {"16", "40"}
    for found in itself.values():
        assert found["mean_drift"] == 0 and found["mean_similarity"] == pytest.approx(1)
        assert found["intervals"]["mean_drift"] == found["intervals"]["loss_change"] == [0, 0]
    for length, found in other.items():
        (_, a), (_, b) = (plain(folder / name, tokens[:, : int(length)]) for name in ("model", "teacher"))
        for k in range(1, 5):
            p, q = a.attentions[k - 1].double(), b.attentions[k - 1].double()
            heads = (p * (p.log() - q.log())).nan_to_num(0).sum(-1).mean((0, 2))
            torch.testing.assert_close(torch.tensor(found["heads"][str(k)]).double(), heads, rtol=1e-3, atol=1e-6)
            cosine = F.cosine_similarity(a.hidden_states[k], b.hidden_states[k], dim=-1).mean().item()
            assert found["similarity"][str(k)] == pytest.approx(cosine, abs=1e-4)
        loss = F.cross_entropy(b.logits[:, :-1].flatten(0, 1), tokens[:, 1 : int(length)].flatten()).item()
        assert found["loss"] == pytest.approx(loss, rel=1e-4)


def test_trend_and_scores_are_those_of_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    plotted = {}
    monkeypatch.setattr(drift, "lines", lambda panels, name, *rest, **more: plotted.update({name: panels}))
    monkeypatch.setattr(drift, "grids", lambda *rest: None)

    def result(run_name: str, step: int, kl: float, similarity: float, kept: float) -> drift.Result:
        model = Model("", Path(run_name) / "checkpoints" / str(step), None, step)  # type: ignore[arg-type]
        values = Drift(torch.full((2, 3), kl), torch.full((2,), similarity), 1.0, 1.0, torch.zeros(1, 3))
        return drift.Result(model, 64, values, kept)

    drift._figures([result("a", 2, 0.5, 0.75, 0.5), result("b", 1, 4.0, 0.25, 0.25), result("a", 1, 2.0, 0.5, 1)])
    assert plotted["trend"]["attention KL (nats)"] == {"a": ([1, 2], [2, 0.5]), "b": ([1], [4])}
    assert plotted["trend"]["similarity"] == {"a": ([1, 2], [0.5, 0.75]), "b": ([1], [0.25])}
    assert plotted["scores"]["score kept"] == {"models": ([0.25, 0.5, 0.75], [0.25, 1, 0.5])}


@pytest.mark.parametrize("points", [80, 8])
def test_positional_vectors_are_means_over_texts(points: int, folder: Path, tmp_path: Path) -> None:
    arguments = ("--texts", "5", "--length", "80", "--points", str(points), "--layers", "2", "4")
    results, tokens = run("positional-vectors", folder, tmp_path / "out", *arguments, hf=("model",))
    _, out = plain(folder / "model", tokens)
    edges, [model] = results["edges"], results["models"]
    assert edges[0] == 0 and edges[-1] == 80 and 64 in edges and len(edges) == points + 1
    for k in (2, 4):
        by_position = out.hidden_states[k].mean(0)
        vectors = by_position - by_position.mean(0)
        vectors = torch.stack([vectors[a:b].mean(0) for a, b in pairwise(edges)])
        similarity = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        torch.testing.assert_close(torch.tensor(model["similarity"][str(k)]), similarity, rtol=0, atol=2e-4)
        border = edges.index(64)
        inside, outside = similarity[:border, :border], similarity[border:, border:]
        means = {"across": similarity[:border, border:].mean()}
        for name, part in (("inside", inside), ("outside", outside)):  # of two that are not the same
            means[name] = (part.sum() - part.trace()) / (part.numel() - len(part))
        for name, mean in means.items():
            assert model["layers"][str(k)][name] == pytest.approx(mean.item(), abs=1e-3), name
    assert set(model["similarity"]) == {"2", "4"}
    size = min(8, border // 2, len(similarity) - border)
    expected = [sum(similarity[b - 1 - i, b + i] for i in range(size)) / size for b in (border, border // 2)]
    assert model["layers"]["4"]["continuity"] == pytest.approx((expected[0] - expected[1]).item(), abs=1e-3)


def test_copies_differ_as_in_plain_transformers(folder: Path, tmp_path: Path) -> None:
    arguments = ("--texts", "2", "--length", "12", "--copies", "3", "--thetas", "1e4", "--skips", "20")
    results, tokens = run("perturbation", folder, tmp_path / "out", *arguments, hf=("model",))
    as_it_is, theta, skip = results["models"]
    assert [each["change"] for each in results["models"]] == ["", "theta 10000", "skip 20"]
    packed = tokens.repeat(1, 3)
    jumps = torch.arange(36)[None] + 20 * torch.arange(3).repeat_interleave(12)
    for found, positions, rope in ((as_it_is, None, {}), (theta, None, {"rope_theta": 1e4}), (skip, jumps, {})):
        model, out = plain(folder / "model", packed, positions, **rope)
        for pair in found["pairs"]:
            a, b = (slice(12 * pair[which], 12 * pair[which] + 12) for which in ("first", "second"))
            assert pair["distance"] == 12 * (pair["second"] - pair["first"])
            for k in range(1, 5):
                hidden = out.hidden_states[k]
                cosine = F.cosine_similarity(hidden[:, a], hidden[:, b], dim=-1).mean().item()
                assert pair["hidden"][k - 1] == pytest.approx(1 - cosine, abs=1e-4)
                layer = model.model.layers[k - 1]
                for what in ("query", "key", "value"):
                    with torch.no_grad():
                        project = getattr(layer.self_attn, f"{what[0]}_proj")
                        state = project(layer.input_layernorm(out.hidden_states[k - 1])).unflatten(2, (-1, 8))
                    cosine = F.cosine_similarity(state[:, a], state[:, b], dim=-1).mean().item()
                    assert pair[what][k - 1] == pytest.approx(1 - cosine, abs=1e-4), what
            p, q = (out.logits[:, each].log_softmax(-1) for each in (a, b))
            assert pair["logits"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-5)
    assert theta["pairs"] != as_it_is["pairs"] != skip["pairs"]


def test_changes_of_queries_are_those_of_plain_projections(folder: Path, tmp_path: Path) -> None:
    results, tokens = run("query-states", folder, tmp_path / "out", "--texts", "3", "--length", "32")
    states, weights = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list)
    for name in ("model", "teacher"):
        model, out = plain(folder / name, tokens)
        attention, norm = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm
        for what in ("query", "key", "value"):
            project = getattr(attention, f"{what[0]}_proj")
            states[what].append(project(norm(out.hidden_states[1])).unflatten(2, (-1, 8)).transpose(1, 2).detach())
            weights[what].append(project.weight.detach().unflatten(0, (-1, 8)))
        query, key = states["query"][-1], states["key"][-1]
        rotated = apply_rotary_pos_emb(query, key, *model.model.rotary_emb(query, torch.arange(32)[None]))
        for what, turned in zip(("rotated query", "rotated key"), rotated, strict=True):
            states[what].append(turned)
    for what, (before, after) in states.items():
        _assert_relative(results["changes"][what], before.pow(2).sum((0, 2)), (after - before).pow(2).sum((0, 2)))
    for what, (before, after) in weights.items():
        _assert_relative(results["changes"][f"{what} weight"], before.pow(2).sum(2), (after - before).pow(2).sum(2))
    spans = results["changes"]["query"]["spans"]
    assert spans and [each["share"] for each in spans] == sorted((each["share"] for each in spans), reverse=True)
    before, after = (x.pow(2).sum((0, 2)) for x in (states["query"][0], states["query"][1] - states["query"][0]))
    before, after = (x[:, :4] + x[:, 4:] for x in (before, after))  # [heads, bands]
    for span in (each for each in spans if each["layer"] == 2):
        place = span["head"] - 1, slice(*span["bands"])
        assert span["change"] == pytest.approx((after[place].sum() / before[place].sum()).sqrt().item(), rel=1e-3)


def _assert_relative(found: dict[str, Any], squares: Tensor, differences: Tensor) -> None:
    """Of layer 2; [heads, dims] each, of which dim i is turned together with dim i + 4."""
    squares, differences = (x[:, :4] + x[:, 4:] for x in (squares, differences))
    heads, bands = (differences.sum(dim) / squares.sum(dim) for dim in (1, 0))
    torch.testing.assert_close(torch.tensor(found["heads"][1]), heads.sqrt(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["bands"][1]), bands.sqrt(), rtol=1e-3, atol=1e-5)
    assert found["layers"][1] == pytest.approx((differences.sum() / squares.sum()).sqrt().item(), rel=1e-3)


def test_a_change_of_rope_alone_turns_queries_and_changes_no_weight(folder: Path, tmp_path: Path) -> None:
    other = write_model("phi3", tmp_path / "other")  # its three projections are one
    write_model("phi3", tmp_path / "model")
    edit_json(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, pad_token_id=0)
    edit_json(tmp_path / "model/config.json", pad_token_id=0)
    arguments = ("--texts", "2", "--length", "32", "--text", str(folder / "texts"))
    results, _ = run("query-states", tmp_path, tmp_path / "out", *arguments, hf=("model", "other"))
    changes = results["changes"]
    assert changes["query"]["layers"][0] < 1e-5 < 1e-2 < changes["rotated query"]["layers"][0]
    assert changes["query weight"]["mean"] == changes["value weight"]["mean"] == 0


@pytest.mark.parametrize(
    ("study", "hf", "arguments", "message"),
    [
        ("drift", ("model",), [], "nothing to compare"),
        ("drift", ("model", "teacher"), ["--scores", "1"], "--scores has 1 numbers"),
        ("drift", ("model", "wide"), [], "wide: cannot be compared with .*hidden_size is 64, there 32"),
        (
            "drift",
            ("model", "teacher"),
            ["--length", "9000", "--texts", "7"],
            "windows of 9000 tokens, --texts asks for 7",
        ),
        ("drift", ("model", "teacher"), ["--length", "16", "--short", "16"], "--short 16: must be less"),
        ("drift", ("model",), ["--runs", "nothing"], "--runs nothing: no run folder with checkpoints"),
        ("positional-vectors", ("model",), ["--layers", "5"], "--layers 5: the layers of .* are 1 to 4"),
        ("positional-vectors", ("model",), ["--length", "64"], "--length 64: the texts must reach past"),
        ("perturbation", ("model",), ["--copies", "1"], "--copies 1: must be 2"),
        ("perturbation", ("model",), ["--thetas", "0"], "--thetas 0: a base"),
        ("query-states", ("model",), [], "give two models, before and after"),
    ],
)
def test_bad_input_is_told(
    study: str, hf: tuple[str, ...], arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    if "wide" in hf:
        write_model("llama_3", folder / "wide", sizes={"hidden_size": 64})
    with pytest.raises(UserError, match=message):
        run(study, folder, tmp_path / "out", *arguments, hf=hf)
    assert not (tmp_path / "out").exists()
