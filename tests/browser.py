"""A page in a real browser, without network: what its reader gets to see."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or Chrome")
# Contrast as in WCAG 2.2, of every text with the page's background; not of text in the cells of a figure.
_LOOK = """<script>addEventListener("load", () => {
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number);
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b); };
  const paper = light(getComputedStyle(document.body).backgroundColor), faint = {};
  for (const each of document.querySelectorAll("body *:not(script, style)")) {
    const own = [...each.childNodes].filter(n => n.nodeType == 3).map(n => n.data.trim()).join("");
    if (!own) continue;
    const svg = each.ownerSVGElement, style = getComputedStyle(each);
    each.scrollIntoView();
    const box = each.getBoundingClientRect(), at = [box.x + box.width / 2, box.y + box.height / 2];
    if (svg && document.elementsFromPoint(...at).some(e => e.matches("image, path"))) continue;
    const ink = light(svg ? style.fill : style.color);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) faint[own] = contrast;
  }
  const seen = {paper, faint, width: document.documentElement.scrollWidth, window: innerWidth,
    text: document.body.innerText,
    figures: [...document.querySelectorAll("svg")].map(s => [s.clientWidth, s.clientHeight]),
    asked: performance.getEntriesByType("resource").map(r => r.name)};
  document.body.innerHTML = ""; document.body.append(Object.assign(document.createElement("pre"),
    {id: "seen", textContent: JSON.stringify(seen)}));
});</script>"""


@dataclass(frozen=True)
class Seen:
    """paper: the background's relative luminance, 0 to 1. faint: texts with a contrast below 4.5, and theirs. width:
    of what is laid out, in pixels; window: of the window. asked: addresses that were asked for."""

    paper: float
    faint: dict[str, float]
    width: int
    window: int
    text: str
    figures: list[tuple[int, int]]
    asked: list[str]


def look(page: Path, folder: Path, dark: bool, width: int = 1100) -> Seen:
    """Opens a copy of `page` in `folder` that tells what is seen."""
    copy = folder / f"seen-{dark}.html"
    copy.write_text(page.read_text(encoding="utf-8") + _LOOK, encoding="utf-8")
    dom = _run(folder, "--dump-dom", f"--window-size={width},1400", *dark * ["--force-dark-mode"], copy.as_uri())
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"{page}: the browser did not get through it"
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return Seen(**seen)


def _run(folder: Path, *arguments: str) -> str:
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
    command = [str(BROWSER), *flags, f"--user-data-dir={folder / 'browser'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
