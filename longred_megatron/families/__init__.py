"""Model families, one in each module, and what a Hugging Face folder's config.json says of its model."""

import importlib
import json
import pkgutil
from pathlib import Path

from longred_megatron.errors import UserError
from longred_megatron.families.base import FAMILIES, Architecture, find_family

__all__ = ["FAMILIES", "Architecture", "read_architecture"]


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
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `hf` must be a Hugging Face model folder with a config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download the file again") from None
    try:
        family = find_family(raw.get("model_type") if isinstance(raw, dict) else None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    from transformers import AutoConfig  # slow to import; needed for the defaults config.json may leave out

    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers validates with many exception types; all mean a bad config.json
        raise UserError(f"{path}: transformers refuses it: {error}") from None
    problems = [f"{path}: {problem}" for problem in family.problems(config)]
    if problems:
        raise UserError(*problems)
    return family.architecture(config)
