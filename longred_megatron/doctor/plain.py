"""A step of a recipe on plain transformers models: what the engine's losses and gradients are compared with.

Only the models are transformers'. What they compute is handed to each objective's own loss, as a rank of one process
would: so it works for every kind, and says nothing of the losses themselves, which the project's tests compare with
plain torch.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longred_megatron.families import Architecture
from longred_megatron.kernels.drawn_entries import BELOW_ONE
from longred_megatron.kernels.top_entries import Entries
from longred_megatron.objectives.base import Activations, Head, HeadEntries, Needs, Tap
from longred_megatron.recipe import Phase
from longred_megatron.training.microbatches import MicroBatch

ATTENTION = "longred_doctor"
_heads: list[tuple[Tensor, Tensor, Tensor]] = []  # query, key and value of each layer of the forward pass that runs


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """torch's attention with the mask that it is given; remembers its inputs."""
    _heads.append((query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def plain_step(
    phase: Phase, student: Architecture, microbatches: Sequence[MicroBatch], groups: Any, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses of a whole step and its gradients by Hugging Face name, on this process's device.

    Args:
        student: with the RoPE and window that it is trained with.
        groups: of a world of one. dtype: of weights and arithmetic.
    """
    ours, theirs = load(phase.recipe.model.hf, student, dtype), {}
    for hf, architecture in phase.teachers.items():
        theirs[hf] = load(hf, architecture, dtype).requires_grad_(False)
    losses: dict[str, float] = {}
    for m in microbatches:
        needs, settings = phase.needs[m.objective], m.settings
        local = _on_device(m)
        target: Activations | None = None
        if needs.teacher:
            assert local.teacher_positions is not None
            folder, taps = phase.teacher_of(m.objective), set(needs.pairs.values())
            teacher = ours if folder is None else theirs[folder]
            with torch.no_grad():
                target = _activations(teacher, local, local.teacher_positions, taps, needs.teacher_head)
                target = _with_entries(target, needs.teacher_entries, local.uniforms)
        own = _activations(ours, local, local.student_positions, needs.pairs.keys(), needs.student_head)
        terms = settings.loss(own, _under_our_taps(needs, target), local, groups)
        loss = torch.stack([term.share for term in terms]).sum()
        (settings.weight * loss / len(microbatches)).backward()
        name = f"loss/{m.objective}"
        losses[name] = losses.get(name, 0.0) + float(loss.detach()) / settings.microbatches
    return losses, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}


def load(hf: Path, architecture: Architecture, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder, with the RoPE and window of `architecture`."""
    config = AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    config.rope_parameters = dict(architecture.rope)
    config.max_position_embeddings = architecture.max_position_embeddings
    model = AutoModelForCausalLM.from_pretrained(hf, config=config, dtype=dtype, attn_implementation=ATTENTION)
    return model.to(torch.cuda.current_device())


def _on_device(m: MicroBatch) -> MicroBatch:
    device = torch.cuda.current_device()
    moved: dict[str, Any] = {n: value.to(device) for n, value in vars(m).items() if isinstance(value, Tensor)}
    return replace(m, **moved)


def _under_our_taps(needs: Needs, teacher: Activations | None) -> Activations:
    """A teacher's values under the names of the student's that they are compared with."""
    if teacher is None:
        return Activations({}, None, "each tensor rank")
    return replace(teacher, taps={tap: teacher.taps[needs.pairs[tap]] for tap in needs.pairs})


def _with_entries(teacher: Activations, few: HeadEntries | None, uniforms: Tensor | None) -> Activations:
    """A few of the teacher's entries in place of its head, where a loss takes these."""
    if few is None or teacher.head is None:
        return teacher
    logits = teacher.head.hidden @ teacher.head.weight[: few.vocab_size].t()
    likelihoods = (logits.float() / few.temperature).softmax(-1)
    if few.drawn:
        assert uniforms is not None
        sums = likelihoods.cumsum(-1)
        wanted = uniforms.flatten(0, 1) * BELOW_ONE * sums[:, -1:]
        entries = torch.searchsorted(sums, wanted, right=True)
        found = likelihoods.gather(-1, entries)
    else:
        chosen, entries = likelihoods.topk(few.number)
        found = torch.cat([chosen, likelihoods.scatter(-1, entries, 0).sum(-1, keepdim=True)], -1)
    return replace(teacher, head=None, entries=Entries(entries.int(), found.log(), few.vocab_size))


def _activations(model: Any, m: MicroBatch, positions: Tensor, taps: Collection[Tap], head: bool) -> Activations:
    """What the model computes of a micro-batch, as `Activations` of one process; tokens see those before them, and
    only their own document where documents are told apart."""
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(model.config).to(
        positions.device
    )  # dynamic RoPE remembers the longest call
    _heads.clear()
    with _attention_outputs(base) as attended:
        out = base(
            m.tokens, position_ids=positions, attention_mask=_mask(m), output_hidden_states=True, use_cache=False
        )
    hidden = [*out.hidden_states[:-1], out.last_hidden_state]
    values: dict[Tap, Tensor] = {}
    for tap in taps:
        if tap.what == "hidden":
            values[tap] = hidden[tap.layer].flatten(0, 1)[:, None]
        elif tap.what == "attention_output":
            values[tap] = attended[tap.layer - 1].flatten(0, 1)[:, None]
        else:
            x = _heads[tap.layer - 1][("query", "key", "value").index(tap.what)]
            values[tap] = x.transpose(1, 2).flatten(0, 1)[:, None]
    _heads.clear()
    weight = model.get_output_embeddings().weight
    own_head = Head(hidden[-1].flatten(0, 1), weight, weight.shape[0]) if head else None
    return Activations(values, own_head, "each tensor rank")


@contextmanager
def _attention_outputs(base: Any) -> Iterator[list[Tensor]]:
    """What each layer's attention adds to the hidden state, in the order of the layers."""
    attended: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, arguments, out: attended.append(out[0]))
        for layer in base.layers
    ]
    try:
        yield attended
    finally:
        for hook in hooks:
            hook.remove()


def _mask(m: MicroBatch) -> Tensor:
    """[sequences, 1, sequence_length, sequence_length]: which keys each query sees."""
    num_sequences, length = m.tokens.shape
    mask = torch.ones(length, length, dtype=torch.bool, device=m.tokens.device).tril().expand(num_sequences, 1, -1, -1)
    if m.documents is not None:
        rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in m.documents]
        numbers = torch.stack(rows).to(m.tokens.device)
        mask = mask & (numbers[:, :, None] == numbers[:, None, :])[:, None]
    return mask
