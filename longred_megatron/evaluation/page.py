"""The report as one HTML page that needs nothing beside itself."""

from collections.abc import Sequence
from html import escape

from longred_megatron.evaluation import plots
from longred_megatron.evaluation.report import (
    ModelReport,
    Report,
    all_notes,
    number,
    percent,
    percent_change,
    summary,
)

CSS = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #23211d; --soft: #6b665c; --faint:
#e4dfd5;
  --m0: #7d7a74; --m1: #0f766e; --m2: #c2570c; --m3: #4f46e5; --m4: #a21caf; --m5: #15803d; --m6: #b91c1c;
  --m7: #0369a1; --m8: #854d0e; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --card: #1f1e1b; --ink: #ece8df; --soft:
#a29c90; --faint: #37342e;
  --m0: #a8a49c; --m1: #3fc1b0; --m2: #f59e52; --m3: #9a9cf8; --m4: #e08af0; --m5: #6cd28f; --m6: #f58a85;
  --m7: #62b8ee; --m8: #d6a94e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
"Segoe UI", Roboto, "Noto Sans",   "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 10px; font-weight: 680; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 52px 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 6px; font-weight: 620; }
p { margin: 0 0 14px; max-width: 74ch; }
.lede { font-size: 17px; color: var(--soft); margin-bottom: 26px; }
.about { color: var(--soft); margin-bottom: 14px; }
.findings { list-style: none; padding: 0; margin: 0 0 28px; }
.findings li { margin: 6px 0; }
.card { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 18px 20px;
margin: 0 0 16px; overflow-x: auto; } .card svg { display: block; width: 100%; min-width: 640px; height: auto;
} svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial,
sans-serif !important; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; border-bottom: 1px solid var(--faint); vertical-align: bottom;
} th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
thead th { font-size: 13px; color: var(--soft); font-weight: 560; line-height: 1.3; }
thead span { display: block; font-weight: 400; white-space: nowrap; }
tbody th { font-weight: 600; text-align: left; white-space: nowrap; }
.key { display: inline-block; width: 20px; height: 0; border-top: 3px solid; margin-right: 9px;
vertical-align: 4px; } .key.reference { border-top-style: dashed; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 24px; font-size: 14px; margin-bottom: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { font-size: 14px; margin: 0 0 8px; } summary { cursor: pointer; color: var(--soft); }
details dl { margin-top: 10px; }
pre { margin: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
overflow-wrap: anywhere; }
@media print { main { padding: 0; } .card { break-inside: avoid; } }
"""


def render(report: Report) -> str:
    """The whole page. All text that comes from outside (names, paths, notes) is escaped."""
    original, extended = report.original_window, report.extended_window
    legend = _legend(report, [model.name for model in report.models])
    parts = [
        f"<h1>{f'From {original:,} to ' if extended > original else ''}{extended:,} tokens</h1>",
        f'<p class="lede">What {_models(report)} gained on long texts and kept on short ones.</p>',
        _findings(report),
        f'<div class="card">{_summary_table(report)}</div>',
        _column_notes(report),
        "<h2>Loss by position</h2>",
        '<p class="about">Mean next-token loss at each place of the window: on long texts a line that keeps '
        "falling past the original window "
        "means the model uses the longer context, one that jumps means it breaks there.</p>",
        f'<div class="card">{legend}{plots.loss_figure(report)}</div>',
        "<h2>Retrieval by length</h2>",
        '<p class="about">Share of prompts in which the model repeats the pass key exactly, '
        "averaged over all depths of the key.</p>",
        f'<div class="card">{legend}{plots.length_figure(report)}</div>',
        "<h2>Retrieval by length and depth</h2>",
        '<p class="about">The same prompts by how long they are and how deep the key stands in them, '
        "0 % being the start; "
        "darker is better.</p>",
        *(_heat_card(report, index) for index in range(len(report.models))),
        *_similarity(report),
        "<h2>Settings</h2>",
        f'<div class="card">{_settings(report)}</div>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation: {escape(', '.join(model.name for model in report.models))}</title>\n"
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _models(report: Report) -> str:
    others = [f"<b>{escape(model.name)}</b>" for model in report.models if not model.is_reference]
    reference = f"<b>{escape(report.reference.name)}</b>"
    return f"{_join(others)}, measured beside the reference {reference}," if others else reference


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _findings(report: Report) -> str:
    """One sentence for every model but the reference, from the numbers of the summary."""
    sentences = []
    for name, variable, is_reference in plots.legend(report):
        model = next(model for model in report.models if model.name == name)
        if not is_reference:
            finding = _finding(model, report.reference)
            sentences.append(f"<li>{_key(variable, is_reference)}<b>{escape(name)}</b>: {finding}</li>")
    return f'<ul class="findings">{"".join(sentences)}</ul>' if sentences else ""


def _finding(model: ModelReport, reference: ModelReport) -> str:
    parts = []
    for ours, theirs in zip(model.retrieval, reference.retrieval, strict=True):
        length = ours.lengths[-1]
        before = f"{percent(theirs.accuracy_at(length))} → " if length in theirs.lengths else ""
        parts.append(f"{ours.task} at {length:,} tokens {before}{percent(ours.accuracy_at(length))}")
    for kind, theirs_loss, ours_loss in (
        ("long", reference.long, model.long),
        ("short", reference.short, model.short),
    ):
        parts.append(f"{kind}-text perplexity {number(theirs_loss.perplexity)} → {number(ours_loss.perplexity)}")
    change = percent_change(model.short.perplexity, reference.short.perplexity)
    return f"{'; '.join(parts)} ({change})."


def _summary_table(report: Report) -> str:
    columns = summary(report)
    heads = []
    for column in columns:
        title, _, window = column.title.partition(" @")
        below = f"<span>at {window} tokens</span>" if window else ""
        heads.append(f'<th scope="col" title="{escape(column.explanation)}">{escape(title)}{below}</th>')
    rows = []
    for index, (name, variable, is_reference) in enumerate(plots.legend(report)):
        cells = "".join(f"<td>{escape(column.cells[index])}</td>" for column in columns)
        rows.append(f'<tr><th scope="row">{_key(variable, is_reference)}{escape(name)}</th>{cells}</tr>')
    head = f'<thead><tr><th scope="col">model</th>{"".join(heads)}</tr></thead>'
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _column_notes(report: Report) -> str:
    rows = "".join(
        f"<dt>{escape(column.title)}</dt><dd>{escape(column.explanation)}</dd>" for column in summary(report)
    )
    return f"<details><summary>What the columns mean</summary><dl>{rows}</dl></details>"


def _legend(report: Report, names: Sequence[str]) -> str:
    items = "".join(
        f"<span>{_key(variable, is_reference)}{escape(name)}{' (reference)' if is_reference else ''}</span>"
        for name, variable, is_reference in plots.legend(report)
        if name in names
    )
    return f'<div class="legend">{items}</div>'


def _key(variable: str, is_reference: bool) -> str:
    return f'<i class="key{" reference" if is_reference else ""}" style="border-color: var({variable})"></i>'


def _heat_card(report: Report, index: int) -> str:
    name, variable, is_reference = plots.legend(report)[index]
    figure = plots.heat_figure(report.models[index], index)
    return f'<div class="card"><h3>{_key(variable, is_reference)}{escape(name)}</h3>{figure}</div>'


def _similarity(report: Report) -> list[str]:
    compared = [model.name for model in report.models if model.similarity is not None]
    if not compared:
        return []
    return [
        "<h2>Hidden states against the reference</h2>",
        '<p class="about">Mean cosine similarity, layer by layer, of hidden states on short texts to '
        f"those of {escape(report.reference.name)}; the closer to 1, the less the model has drifted.</p>",
        f'<div class="card">{_legend(report, compared)}{plots.similarity_figure(report)}</div>',
    ]


def _settings(report: Report) -> str:
    rows = [("notes", "<br>".join(escape(note) for note in all_notes(report)))]
    for model in report.models:
        rows.append(
            (
                model.name,
                escape(f"{model.path} ({model.family}, {model.num_parameters:,} parameters, RoPE {model.rope})"),
            )
        )
    rows += [(key, escape(_setting(value))) for key, value in report.settings.items() if value not in (None, [])]
    rows += [(key, escape(value)) for key, value in report.versions.items()]
    rows.append(("time", f"{report.seconds:.0f} seconds"))
    if report.command:
        rows.append(("command", f"<pre>{escape(report.command)}</pre>"))
    return (
        "<dl>" + "".join(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{value}</dd>" for key, value in rows) + "</dl>"
    )


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
