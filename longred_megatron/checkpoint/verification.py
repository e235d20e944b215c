"""Is a loaded model the one in a Hugging Face folder? Every tensor bit by bit, then the logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from longred_megatron.checkpoint.causal_model import load_causal_model
from longred_megatron.checkpoint.huggingface import full_tensors
from longred_megatron.checkpoint.weight_files import WeightFiles
from longred_megatron.families import Architecture
from longred_megatron.model.chunk import ModelChunk

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `different`: names of tensors with another bit. Logits are fp32, in nats."""

    num_tensors: int
    different: list[str]
    max_logit_difference: float
    max_logit: float


def verify(
    chunks: Sequence[ModelChunk],
    hf: Path,
    architecture: Architecture,
    groups: ProcessGroupCollection,
    *,
    num_tokens: int = 64,
    seed: int = 0,
) -> Verification:
    """Compares a whole model in this process (a world of one) with the folder `hf`.

    Tensors are compared in the folder's dtype, logits of one random sequence of `num_tokens` tokens in fp32,
    to which the chunk is converted in place. The chunk has its own RoPE, transformers the folder's.

    Raises:
        UserError: the folder's weights cannot be read or are of another model.
    """
    assert len(chunks) == 1 and torch.distributed.get_world_size() == 1
    with WeightFiles(hf) as files:
        files.check(architecture)
        compared = [
            (name, same_bits(tensor, files[name][:]))
            for tensors in full_tensors(chunks, architecture, groups)
            for name, tensor in tensors.items()
        ]
    tokens = torch.randint(
        architecture.vocab_size,
        (1, num_tokens),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.int64,
    )
    ours, theirs = chunk_logits(chunks[0], architecture, tokens), _transformers_logits(hf, tokens)
    return Verification(
        num_tensors=len(compared),
        different=[name for name, same in compared if not same],
        max_logit_difference=(ours - theirs).abs().max().item(),
        max_logit=theirs.abs().max().item(),
    )


def same_bits(tensor: Tensor, reference: Tensor) -> bool:
    """Whether `tensor`, in `reference`'s dtype, is the same bit by bit (0 and -0 differ)."""
    bits = _BITS[reference.element_size()]
    return torch.equal(tensor.to(reference.dtype).view(bits), reference.view(bits))


@torch.no_grad()
def chunk_logits(chunk: ModelChunk, architecture: Architecture, tokens: Tensor) -> Tensor:
    """Logits [sequences, sequence_length, vocabulary] of a whole model in one chunk, which becomes fp32."""
    chunk = chunk.float().eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden, _ = chunk(tokens, positions, length=tokens.shape[1])
    logits = hidden[:, 0] @ chunk.head_weight().T
    return logits[:, : architecture.vocab_size].view(*tokens.shape, -1)


@torch.no_grad()
def _transformers_logits(hf: Path, tokens: Tensor) -> Tensor:
    return load_causal_model(hf, torch.float32)(tokens, use_cache=False).logits
