"""Models as transformers loads them: what is evaluated, and the reference for what Megatron computes."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from longred_megatron.errors import UserError
from longred_megatron.files import read_json


def load_causal_model(hf: Path, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder, in evaluation mode.

    Only safetensors are read, and no code of the folder is run. transformers shows a progress bar for each model it
    loads, terminal or not; from this call on only on a terminal.

    Raises:
        UserError: transformers cannot load it, not every weight of model and files has its one counterpart, or one is
            NaN or infinite.
    """
    from transformers import AutoModelForCausalLM  # here, because it takes seconds
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        files = _tensor_files(hf)
        model, loading = AutoModelForCausalLM.from_pretrained(
            hf,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # whatever transformers says of a damaged folder
        raise UserError(f"{hf}: transformers cannot load the model ({type(error).__name__}: {error})") from error
    problems = [*_loading_problems(hf, loading), *_value_problems(hf, model, files)]
    problems += [
        f"{hf}: {name} is in more than one file ({', '.join(where)}); remove all but the right one"
        for name, where in files.items()
        if len(where) > 1
    ]
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
        found = sorted(
            entry if isinstance(entry, str) else str(entry[0])
            for entry in loading[key]
            if not str(entry).endswith("rotary_emb.inv_freq")
        )
        if found:
            yield f"{hf}: {what.format(_some(found))}; make the folder whole, or correct its config.json"
    if errors := loading.get("error_msgs"):
        yield f"{hf}: transformers could not load all weights ({'; '.join(map(str, errors))}); make the folder whole"


def _value_problems(hf: Path, model: torch.nn.Module, files: dict[str, list[str]]) -> Iterator[str]:
    with torch.no_grad():
        # The sum is NaN or infinite where one value is; of finite ones it may overflow, which the second look finds.
        names = [
            name
            for name, values in model.named_parameters()
            if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all()
        ]
    if names:
        listed = _some([f"{name} ({', '.join(files.get(name, []))})" for name in names])
        yield f"{hf}: {listed}: holds NaN or infinite weights; the files are damaged, or training diverged"


def _tensor_files(hf: Path) -> dict[str, list[str]]:
    """Tensor -> the names of the files that hold it, of those that transformers reads."""
    index = hf / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (hf / names[0]).is_file():
        if not index.is_file():
            return {}  # transformers says what it looks for
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors files ({error!r}); download it again") from None
    found: dict[str, list[str]] = {}
    for name in names:
        try:
            with safe_open(hf / name, "pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (no mapping)
                    found.setdefault(tensor, []).append(name)
        except Exception as error:  # of safetensors, whatever its header ends in
            raise UserError(f"{hf / name}: not a whole safetensors file ({error}); download it again") from None
    return found


def _some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
