"""Descriptions of GPUs, from this package's file or a user's own."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from longred_megatron.errors import UserError
from longred_megatron.files import read_text, reason
from longred_megatron.recipe import recipe_yaml
from longred_megatron.recipe.problems import nearest
from longred_megatron.settings import PositiveFloat, PositiveInt, Settings

KNOWN = Path(__file__).parent / "gpus.yaml"
Share = Annotated[float, Field(gt=0, le=1)]


class Gpu(Settings):
    """One GPU and its links; see gpus.yaml for units and sources."""

    memory_bytes: PositiveFloat
    bf16_flops: PositiveFloat
    fp8_flops: PositiveFloat | None
    memory_bandwidth: PositiveFloat
    link_bandwidth: PositiveFloat
    network_bandwidth: PositiveFloat
    gpus_per_node: PositiveInt
    matrix_efficiency: Share
    attention_efficiency: Share
    memory_efficiency: Share
    link_efficiency: Share
    network_efficiency: Share
    reserved_bytes: Annotated[float, Field(ge=0)]
    operation_host_seconds: Annotated[float, Field(ge=0)]
    step_host_seconds: Annotated[float, Field(ge=0)]
    dollars_per_hour: PositiveFloat | None


def read_gpu(name: str) -> Gpu:
    """A GPU of gpus.yaml by its name; FILE.yaml:NAME is one of another file, FILE.yaml the only one of it.

    What another file's `defaults` leave out is as in gpus.yaml.

    Raises:
        UserError: there is no such name or file, or its content is not as in gpus.yaml.
    """
    path, _, inside = name.rpartition(":") if ":" in name else ((name, "", "") if _is_file(name) else ("", "", name))
    known = _read(KNOWN)
    content = _read(Path(path)) if path else known
    gpus: dict[str, Any] = content["gpus"]
    if path and not inside:
        if len(gpus) != 1:
            raise UserError(f"--gpu {name}: the file has {', '.join(gpus)}; say which: {path}:{next(iter(gpus))}")
        [inside] = gpus
    if inside not in gpus:
        hint = nearest(inside, gpus)
        tip = f"did you mean {hint}? " if hint else ""
        raise UserError(f"--gpu {name}: no such GPU; {tip}there are {', '.join(gpus)}, and FILE.yaml:NAME of your own")
    try:
        return Gpu.model_validate(known["defaults"] | content.get("defaults", {}) | gpus[inside])
    except ValidationError as error:
        found = [f"--gpu {name}: `{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors()]
        raise UserError(*found) from None


def gpu_of_card(card: str, memory_bytes: float) -> Gpu | None:
    """The GPU of gpus.yaml that a driver calls `card`, such as "NVIDIA H100 80GB HBM3"; None: it is not there, as those
    on PCIe, which have other peaks and links."""
    words = re.split(r"\W+", card.lower())
    for name in _read(KNOWN)["gpus"] if "pcie" not in words else ():
        gpu = read_gpu(name)
        if name.partition("-")[0] in words and abs(gpu.memory_bytes - memory_bytes) < 0.1 * memory_bytes:
            return gpu
    return None


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _read(path: Path) -> dict[str, Any]:
    try:
        values, duplicates = recipe_yaml.parse(read_text(path, recipe_yaml.MAX_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"--gpu {path}: cannot be read: {reason(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--gpu {path}: is not YAML: {recipe_yaml.explain(error)}") from None
    sections = [values.get("gpus")] if isinstance(values, dict) else [None]
    if isinstance(values, dict) and "defaults" in values:
        sections.append(values["defaults"])
    if duplicates or not all(isinstance(section, dict) and section for section in sections):
        raise UserError(f"--gpu {path}: must have `gpus: {{NAME: {{memory_bytes: ..., ...}}}}`, each key once")
    if not all(isinstance(gpu, dict) for gpu in values["gpus"].values()):
        raise UserError(f"--gpu {path}: every entry of `gpus` must be a mapping")
    return values
