"""What every study leaves: results.json, its tokens, and a page with its tables and figures beside them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longred_megatron.files import appearing_whole, save_tensors, write_text
from longred_megatron.page import PAGE, RESULTS, Plot, html

TOKENS = "tokens.safetensors"


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
        write_text(output / PAGE, html(self.title, self.notes, self.figures, [self.table, *self.more_tables]))
        if self.tokens is not None:
            with appearing_whole(output / TOKENS) as partial:
                save_tensors({"tokens": self.tokens.contiguous()}, partial, {"kind": self.kind})
        write_text(output / RESULTS, json.dumps({"kind": self.kind} | self.results, indent=1, allow_nan=False) + "\n")

    def text(self) -> str:
        """The table for a console."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = ("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in self.table)
        return "\n".join([*self.notes, "", *lines])
