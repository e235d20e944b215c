"""Model families, one in each module, and what a Hugging Face folder's config.json says of its model."""

import copy
import importlib
import pkgutil
from pathlib import Path

from longred_megatron.errors import UserError
from longred_megatron.families.base import FAMILIES, Architecture, find_family
from longred_megatron.families.config_checks import config_problems, size_problems
from longred_megatron.files import read_json, reason

__all__ = ["FAMILIES", "Architecture", "read_architecture"]

_MAX_SHOWN = 300  # characters of what transformers says


def discover() -> None:
    """Imports every module of this package, and with it the family that it defines."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


discover()


def read_architecture(hf: Path) -> Architecture:
    """Reads `hf`/config.json. No code that came with the model is run.

    Raises:
        UserError: no such folder or file, a broken file, or a model this project cannot represent exactly.
    """
    path = Path(hf) / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `hf` must be a Hugging Face model folder with a config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); download the file again") from None
    try:
        family = find_family(raw.get("model_type") if isinstance(raw, dict) else None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    if problems := size_problems(raw):
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    from transformers import CONFIG_MAPPING  # slow to import; needed for the defaults config.json may leave out

    try:
        # The class by its name, of what was read: no `auto_map` or `configuration_files` leads elsewhere.
        config = CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(raw))
    except Exception as error:  # transformers validates with many exception types; all mean a bad config.json
        text = " ".join(str(error).split())
        raise UserError(f"{path}: transformers refuses it: {text[:_MAX_SHOWN]}") from None
    problems = config_problems(raw, config) or list(family.problems(config))
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return family.architecture(config)
