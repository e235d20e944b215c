"""Models as transformers loads them: what is evaluated, and the reference for what Megatron computes."""

import sys
from pathlib import Path
from typing import Any

import torch

from longred_megatron.errors import UserError


def load_causal_model(hf: Path, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder, in evaluation mode.

    Only safetensors are read, and no code of the folder is run. transformers shows a progress bar for each model it
    loads, terminal or not; from this call on only on a terminal.

    Raises:
        UserError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM  # here, because it takes seconds
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            hf, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{hf}: transformers cannot load the model: {error}") from error
    return model.eval()
