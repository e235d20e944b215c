"""A page that needs nothing beside itself, and the looks of its figures: SVG in the page's light or dark colours."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import matplotlib
from matplotlib.figure import Figure

PAGE, RESULTS = "report.html", "results.json"
# Stand-ins that `svg_of` turns into CSS variables: matplotlib has to be given some colour, and the page
# decides which.
INK, FAINT = "#010101", "#020202"
MODEL_COLOURS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006", "#0a0007", "#0a0008")
REFERENCE_COLOUR = "#0a0000"
VARIABLES = {INK: "--ink", FAINT: "--faint", REFERENCE_COLOUR: "--m0"} | {
    colour: f"--m{index}" for index, colour in enumerate(MODEL_COLOURS, start=1)
}
MARKERS = "osD^vPX*"
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}
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


def html(title: str, notes: Sequence[str], figures: Sequence[Plot], tables: Sequence[Sequence[Sequence[str]]]) -> str:
    """A page. notes: paragraphs. tables: rows of texts, the first is the head."""
    return _TEMPLATE.render(title=title, notes=notes, figures=figures, tables=tables)


def svg_of(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element for an HTML page: own ids, colours as CSS variables, no address of
    anything outside."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = (
        svg.replace(' id="', f' id="{prefix}-')
        .replace('href="#', f'href="#{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
