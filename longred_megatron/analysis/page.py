"""What every study leaves: results.json, and a page with its tables and figures beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from longred_megatron.evaluation.report import PAGE, RESULTS
from longred_megatron.files import write_text

# Autoescape: names and paths come from outside. Figures are made here.
_TEMPLATE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #23211d; --faint: #e4dfd5; --m0: #7d7a74; --m1: #0f766e; --m2: #c2570c;
  --m3: #4f46e5; --m4: #a21caf; --m5: #15803d; --m6: #b91c1c; --m7: #0369a1; --m8: #854d0e; }
body { max-width: 1080px; margin: 40px auto; padding: 0 24px; font: 16px/1.5 system-ui, sans-serif; color: #23211d; }
table { border-collapse: collapse; } th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid #e4dfd5; }
th:first-child, td:first-child { text-align: left; } svg { width: 100%; height: auto; }
</style>
<h1>{{ title }}</h1>
{% for line in notes %}
<p>{{ line }}</p>
{% endfor %}
{% for figure in figures %}
{{ figure | safe }}
{% endfor %}
<table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</html>
""")


@dataclass(frozen=True)
class Study:
    """kind: what results.json is known by. table: rows of texts, the first is the head. figures: <svg> elements."""

    kind: str
    title: str
    notes: Sequence[str]
    table: Sequence[Sequence[str]]
    figures: Sequence[str]
    results: dict[str, Any]

    def write(self, output: Path) -> None:
        """Writes both files."""
        page = _TEMPLATE.render(title=self.title, notes=self.notes, table=self.table, figures=self.figures)
        write_text(output / PAGE, page)
        write_text(output / RESULTS, json.dumps({"kind": self.kind} | self.results, indent=1, allow_nan=False) + "\n")

    def text(self) -> str:
        """The table for a console."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = ("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in self.table)
        return "\n".join([*self.notes, "", *lines])
