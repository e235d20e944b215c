"""The findings as one HTML page that needs nothing beside itself, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2

from longred_megatron.doctor.examination import Section, is_healthy, verdict
from longred_megatron.files import write_text
from longred_megatron.page import RESULTS
from longred_megatron.recipe import Recipe, dump_recipe

KIND = "longred-megatron examination by doctor"
PAGE = "doctor.html"

# Autoescape: paths, hosts and messages come from outside.
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write(folder: Path, sections: Sequence[Section], recipe: Recipe, command: str, seconds: float) -> None:
    """Writes doctor.html and results.json; those of an earlier examination are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    text = render(sections, recipe, command, seconds)
    write_text(folder / PAGE, text)
    values = {
        "kind": KIND,
        "verdict": verdict(sections),
        "healthy": is_healthy(sections),
        "seconds": seconds,
        "command": command,
        "sections": [asdict(section) for section in sections],
        "recipe": recipe.model_dump(mode="json"),
    }
    write_text(folder / RESULTS, json.dumps(values, indent=1, default=str))


def render(sections: Sequence[Section], recipe: Recipe, command: str, seconds: float) -> str:
    """The whole page."""
    return _ENVIRONMENT.get_template("page.html").render(
        sections=sections,
        verdict=verdict(sections),
        healthy=is_healthy(sections),
        recipe=dump_recipe(recipe),
        command=command,
        seconds=seconds,
    )
