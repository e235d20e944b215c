"""The examples of CONTRIBUTING: what a new objective, RoPE method or family looks like. The tests run them."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def example(heading: str) -> str:
    """The Python file shown under a heading of CONTRIBUTING."""
    [section] = re.findall(
        rf"^## {heading}\n(.*?)(?=^## )", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def scratch_copy(folder: Path) -> Path:
    """A copy of the package in `folder`, to put files into. Returns the package's folder there."""
    package = folder / "longred_megatron"
    shutil.copytree(ROOT / "longred_megatron", package, ignore=shutil.ignore_patterns("*.pyc", "__pycache__"))
    return package
