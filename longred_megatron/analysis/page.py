"""What every study leaves: results.json, its tokens, and a page with its tables and figures beside them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from longred_megatron.evaluation.report import PAGE, RESULTS
from longred_megatron.files import appearing_whole, save_tensors, write_text

TOKENS = "tokens.safetensors"
# Autoescape: names and paths come from outside. Figures are made here.
_TEMPLATE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #23211d; --soft: #6b665c; --faint: #e4dfd5; --m0: #7d7a74;
  --m1: #0f766e; --m2: #c2570c; --m3: #4f46e5; --m4: #a21caf; --m5: #15803d; --m6: #b91c1c;
  --m7: #0369a1; --m8: #854d0e; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #ece8df; --soft: #a29c90; --faint: #37342e;
  --m0: #a8a49c; --m1: #3fc1b0; --m2: #f59e52; --m3: #9a9cf8; --m4: #e08af0; --m5: #6cd28f; --m6: #f58a85;
  --m7: #62b8ee; --m8: #d6a94e; } }
body { max-width: 1080px; margin: 40px auto; padding: 0 24px; font: 16px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); }
table { border-collapse: collapse; margin-bottom: 32px; } div { overflow-x: auto; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } svg { width: 100%; min-width: 640px; height: auto; }
figure { margin: 32px 0; } figcaption { color: var(--soft); max-width: 74ch; }
</style>
<h1>{{ title }}</h1>
{% for line in notes %}
<p>{{ line }}</p>
{% endfor %}
{% for figure in figures %}
<figure>
<div>{{ figure.svg | safe }}</div>
<figcaption>{{ figure.caption }}</figcaption>
</figure>
{% endfor %}
{% for table in tables %}
<div>
<table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{% endfor %}
</html>
""")


@dataclass(frozen=True)
class Plot:
    """svg: an <svg> element. caption: what it means, and what to do about it, in one line."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Study:
    """kind: what results.json is known by. table: rows of texts, the first is the head; more_tables: others, on
    the page alone. tokens: [texts, length]."""

    kind: str
    title: str
    notes: Sequence[str]
    table: Sequence[Sequence[str]]
    figures: Sequence[Plot]
    results: dict[str, Any]
    tokens: Tensor | None = None
    more_tables: Sequence[Sequence[Sequence[str]]] = ()

    def write(self, output: Path) -> None:
        """Writes all files."""
        tables = [self.table, *self.more_tables]
        page = _TEMPLATE.render(title=self.title, notes=self.notes, tables=tables, figures=self.figures)
        write_text(output / PAGE, page)
        if self.tokens is not None:
            with appearing_whole(output / TOKENS) as partial:
                save_tensors({"tokens": self.tokens.contiguous()}, partial, {"kind": self.kind})
        write_text(output / RESULTS, json.dumps({"kind": self.kind} | self.results, indent=1, allow_nan=False) + "\n")

    def text(self) -> str:
        """The table for a console."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = ("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in self.table)
        return "\n".join([*self.notes, "", *lines])
