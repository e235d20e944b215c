"""Models as transformers loads them: what is evaluated, and the reference for what Megatron computes."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longred_megatron.checkpoint.weight_files import HARMLESS_SUFFIXES, WeightFiles
from longred_megatron.errors import UserError, first_few


def load_causal_model(hf: Path, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder, in evaluation mode.

    Only safetensors are read, and no code of the folder is run. transformers shows a progress bar for each model it
    loads, terminal or not; from this call on only on a terminal.

    Raises:
        UserError: transformers cannot load it, not every weight of model and files has its one counterpart, or one is
            no floating-point number, NaN or infinite.
    """
    from transformers import AutoModelForCausalLM  # here, because it takes seconds
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    with WeightFiles(hf) as files:
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                hf,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers says of a damaged folder
            raise UserError(f"{hf}: transformers cannot load the model ({type(error).__name__}: {error})") from error
        problems = [*_loading_problems(hf, loading), *_value_problems(model, files)]
    if problems:
        raise UserError(*problems)
    return model.eval()


def _loading_problems(hf: Path, loading: dict[str, Any]) -> Iterator[str]:
    """A sentence for each kind of tensor without its counterpart; transformers would go on with random weights.

    What it ties or computes itself (a tied head, `rotary_emb.inv_freq`) it does not report as missing.
    """
    for key, what in (
        ("missing_keys", "has no tensor {}; its model needs it"),
        ("mismatched_keys", "has {} in another shape than its config.json gives"),
        ("unexpected_keys", "has {}, which its model has no place for"),
    ):
        names = (entry if isinstance(entry, str) else str(entry[0]) for entry in loading[key])
        found = sorted(name for name in names if not name.endswith(HARMLESS_SUFFIXES))
        if found:
            yield f"{hf}: {what.format(first_few(found))}; make the folder whole, or correct its config.json"
    if errors := loading.get("error_msgs"):
        yield f"{hf}: transformers could not load all weights ({'; '.join(map(str, errors))}); make the folder whole"


def _value_problems(model: torch.nn.Module, files: WeightFiles) -> Iterator[str]:
    """Of the weights that are in use: files may hold other tensors, such as masks in whole numbers."""
    weights = dict(model.named_parameters())
    if whole := [name for name in weights if name in files and files[name].get_dtype()[0] not in ("F", "B")]:
        yield (
            f"{files.hf}: {first_few([f'{name} ({files[name].get_dtype()})' for name in whole])}: weights must be "
            "floating-point numbers; use the model that is not quantised"
        )
    with torch.no_grad():
        # The sum is NaN or infinite where one value is; of finite ones it may overflow, which the second look finds.
        damaged = [
            name
            for name, values in weights.items()
            if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all()
        ]
    if damaged:
        listed = first_few([f"{name} ({files.path(name).name})" if name in files else name for name in damaged])
        yield f"{files.hf}: {listed}: holds NaN or infinite weights; the files are damaged, or training diverged"
