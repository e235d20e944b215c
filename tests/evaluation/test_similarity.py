from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longred_megatron.evaluation.models import CausalModel
from longred_megatron.evaluation.similarity import hidden_state_similarity, why_not_comparable
from tests.evaluation.conftest import loaded

TOKENS = torch.randint(0, 258, (3, 40), generator=torch.Generator().manual_seed(0))


def test_model_to_itself_is_one(base: CausalModel) -> None:
    result = hidden_state_similarity(base, base, TOKENS, tokens_per_batch=40)
    assert result.by_layer == pytest.approx([1.0] * 3, abs=1e-6)
    assert result.mean == pytest.approx(1.0, abs=1e-6)


def test_equals_direct_computation_for_any_batch(base: CausalModel, folders: dict[str, Path]) -> None:
    other = loaded(folders["longer"])
    with torch.no_grad():
        ours = other.network(input_ids=TOKENS, output_hidden_states=True).hidden_states
        theirs = base.network(input_ids=TOKENS, output_hidden_states=True).hidden_states
    expected = [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(ours, theirs, strict=True)]
    for tokens_per_batch in (40, 80, 1000):
        result = hidden_state_similarity(other, base, TOKENS, tokens_per_batch)
        assert result.by_layer == pytest.approx(expected, abs=1e-6)
        assert result.mean == pytest.approx(sum(expected[1:]) / 2, abs=1e-6)


def test_says_why_models_cannot_be_compared(base: CausalModel, folders: dict[str, Path]) -> None:
    assert why_not_comparable(loaded(folders["longer"]), base) is None
    assert "width 32 differs from the reference's 16" in str(why_not_comparable(loaded(folders["wider"]), base))
    assert "tokenizer" in str(why_not_comparable(loaded(folders["onebos"]), base))
