"""How far a model's hidden states have moved from the reference's, layer by layer."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from longred_megatron.evaluation.models import CausalModel


@dataclass(frozen=True)
class LayerSimilarity:
    """by_layer[k]: mean over all tokens of cos(h_k of the model, h_k of the reference); 0 is the embedding,
    the last is after the final norm, as in Hugging Face's `hidden_states`. mean: over layers 1 and up, the
    embedding left out."""

    window: int
    num_windows: int
    by_layer: tuple[float, ...]
    mean: float


def why_not_comparable(model: CausalModel, reference: CausalModel) -> str | None:
    """One sentence when hidden states cannot be compared, else None."""
    for what, ours, theirs in (
        ("width", model.facts.hidden_size, reference.facts.hidden_size),
        ("depth", model.facts.num_layers, reference.facts.num_layers),
    ):
        if ours != theirs:
            return f"hidden states not compared: {what} {ours} differs from the reference's {theirs}"
    if model.encoder.fingerprint != reference.encoder.fingerprint:
        return "hidden states not compared: the tokenizer is not the reference's"
    return None


@torch.inference_mode()
def hidden_state_similarity(
    model: CausalModel, reference: CausalModel, tokens: Tensor, tokens_per_batch: int
) -> LayerSimilarity:
    """Mean cosine similarity by layer on tokens [windows, window]. Hidden states of one batch exist at a
    time, cosines are fp32."""
    num_windows, window = tokens.shape
    batches = tokens.split(max(1, tokens_per_batch // window))
    sums = torch.zeros(model.facts.num_layers + 1, dtype=torch.float64)
    for batch in tqdm(batches, desc=f"{model.name}: similarity", unit="batch", disable=None, leave=False):
        pairs = zip(_hidden_states(model, batch), _hidden_states(reference, batch), strict=True)
        for layer, (ours, theirs) in enumerate(pairs):
            cosines = F.cosine_similarity(ours.float(), theirs.to(ours.device).float(), dim=-1)
            sums[layer] += cosines.double().sum().item()
    by_layer = (sums / tokens.numel()).tolist()
    return LayerSimilarity(window, num_windows, tuple(by_layer), sum(by_layer[1:]) / len(by_layer[1:]))


def _hidden_states(model: CausalModel, tokens: Tensor) -> tuple[Tensor, ...]:
    """The base model is called, not the causal one, so that no logits are computed."""
    base = getattr(model.network, "base_model", model.network)
    return base(input_ids=tokens.to(model.device), use_cache=False, output_hidden_states=True).hidden_states
