import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from longred_megatron.analysis.layer_choice import LayerDrift
from longred_megatron.analysis.measure import Drift, Subject, measure_drift
from longred_megatron.analysis.network import Network
from longred_megatron.errors import UserError
from longred_megatron.evaluation.intervals import mean_interval
from longred_megatron.evaluation.texts import cut_windows, load_encoder, text_source
from tests.training.workspace import make_workspace
from tools.select_layers import main

TINY_BASE = Path(__file__).parent.parent / "assets/tiny_base"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def plain(folder: Path, tokens: torch.Tensor, **rope: Any) -> Any:
    """What transformers gives for the model with other `rope_parameters`."""
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = config.rope_parameters | rope
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(tokens, labels=tokens, output_attentions=True, output_hidden_states=True)


def check_drift(found: dict[str, Any], before: Any, after: Any) -> None:
    """Of every layer and head, against transformers."""
    for k, (p, q) in enumerate(zip(before.attentions, after.attentions, strict=True), start=1):
        p, q = p.double(), q.double()
        kl = (p * (p.log() - q.log())).nan_to_num(0).sum(-1).mean((0, 2))
        torch.testing.assert_close(torch.tensor(found["heads"][str(k)]).double(), kl, rtol=1e-3, atol=1e-7)
        assert found["layers"][str(k)] == pytest.approx(kl.mean().item(), rel=1e-3)


def of_texts(tokens: torch.Tensor, before: Any, after: Any) -> list[list[float]]:
    """Intervals over texts of the mean KL, the mean similarity and the loss's change."""
    kl, similarity = torch.zeros(len(tokens)).double(), torch.zeros(len(tokens)).double()
    layers = len(before.attentions)
    for p, q in zip(before.attentions, after.attentions, strict=True):
        p, q = p.double(), q.double()
        kl += (p * (p.log() - q.log())).nan_to_num(0).sum(-1).mean((1, 2)) / layers
    for a, b in zip(before.hidden_states[1:], after.hidden_states[1:], strict=True):
        similarity += F.cosine_similarity(a, b, dim=-1).mean(1) / layers
    labels = tokens[:, 1:]
    losses = [F.cross_entropy(x.logits[:, :-1].mT, labels, reduction="none").mean(1) for x in (before, after)]
    values = torch.stack([kl, similarity, losses[1] - losses[0]], dim=1).numpy()
    return [[each.low, each.high] for each in mean_interval(values, range(len(tokens))) or ()]


def test_the_files_hold_what_transformers_gives(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    output, model = tmp_path / "out", recipe.parent / "model"
    ropes = {
        "{method: pi, factor: 4}": {"rope_type": "linear", "factor": 4.0},
        "{method: abf, theta: 1.0e8}": {"rope_theta": 1e8},
    }
    main([str(recipe), "--texts", "5", "--length", "48", "--output", str(output), "--rope", *ropes])
    drift = json.loads((output / "drift.json").read_text())
    tokens = load_file(output / "tokens.safetensors")["tokens"]
    assert tokens.shape == (5, 48) and set(drift) == {"layers", "heads", "ranking", "chosen"}
    before = plain(model, tokens)
    check_drift(drift, before, plain(model, tokens, rope_theta=1e6))
    assert drift["ranking"] == sorted(range(1, 5), key=lambda k: -drift["layers"][str(k)])
    assert drift["chosen"] == [next(k for k in drift["ranking"] if k != 4), 4]  # the recipe names two
    sweep = json.loads((output / "results.json").read_text())["sweep"]
    assert [each["rope"] for each in sweep] == ["pi factor 4", "abf theta 1e+08"]
    for found, rope in zip(sweep, ropes.values(), strict=True):
        after = plain(model, tokens, **rope)
        check_drift(found, before, after)
        by_text = of_texts(tokens, before, after)
        for name, interval in zip(("mean_drift", "mean_similarity", "loss_change"), by_text, strict=True):
            assert found["intervals"][name] == pytest.approx(interval, rel=1e-3, abs=2e-4), name
        losses = [found["original_loss"], found["loss"]]
        assert losses == pytest.approx([before.loss.item(), after.loss.item()], rel=1e-4)
        for k, (a, b) in enumerate(zip(before.hidden_states, after.hidden_states, strict=True)):
            if k > 0:
                cosine = F.cosine_similarity(a, b, dim=-1).mean().item()
                assert found["similarity"][str(k)] == pytest.approx(cosine, abs=1e-4)
    shown = capsys.readouterr().out
    assert f"layers: {sorted(drift['chosen'])}" in shown and "What each RoPE alone breaks" in shown
    assert (output / "report.html").read_text().count("<svg") == 3


def test_drift_grows_with_theta_and_factor() -> None:
    """On a model that has learned something: the demo's."""
    network = Network(TINY_BASE, torch.float32, torch.device("cpu"))
    text = cut_windows(text_source([]), load_encoder(TINY_BASE), 256, 1, seed=0).tokens
    theta = network.config.rope_parameters["rope_theta"]
    for ropes in (
        [{"rope_type": "default", "rope_theta": theta * growth} for growth in (1, 1.1, 2, 8, 100)],
        [{"rope_type": "linear", "rope_theta": theta, "factor": factor} for factor in (1.0, 1.1, 2.0, 4.0, 16.0)],
    ):
        others = [Subject(network, network.rotary(rope)) for rope in ropes]
        drifts = [each.layers.mean().item() for each in measure_drift(text, Subject(network), others)]
        assert drifts == sorted(drifts) and drifts[0] == 0 < drifts[1], drifts


def test_the_last_layer_is_chosen_once_and_at_the_end() -> None:
    layers = torch.tensor([0.1, 0.4, 0.2, 0.3])
    found = LayerDrift(Drift(layers[:, None], layers, 0.0, 0.0, torch.zeros(1, 3)), torch.zeros(1, 2), {})
    assert found.ranking == [2, 4, 3, 1]
    assert [found.chosen(count) for count in (1, 2, 3, 4)] == [[4], [2, 4], [2, 3, 4], [2, 3, 1, 4]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.rope=none"], "`model.rope` is none: .*name the layers"),
        (["model.rope=dynamic", "--length", "16"], "changes nothing on texts of 16 tokens"),
        (["--length", "65"], "--length 65: longer than the window of 64"),
        (["--texts", "0"], "--texts 0: must be 1 to"),
        (["--texts", "9000"], "has only .* different texts of 64 tokens"),
        (["--rope", "{method: abf, theta: 10}"], "`rope.theta` is 10: is below"),
        (["--rope", "alibi"], "alibi"),
    ],
)
def test_bad_input_is_told(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(recipe), *arguments])
