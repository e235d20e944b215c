"""The documents stay true: the files, make targets and flags they name exist."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml

from longred_megatron.objectives import KINDS
from longred_megatron.objectives.base import Objective
from longred_megatron.rope import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "docker/*.md", "recipes/*.md") for path in ROOT.glob(pattern)
)

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL_LANGUAGES = {"", "sh", "bash", "shell", "console"}
TOOL = re.compile(r"^(?:.*/)?(tools/\w+\.py)$")
NAMED_FILE = re.compile(
    r"(?<![\w/.-])(?:docker|docs|longred_megatron|recipes|tests|tools)/[\w./-]*\w\.(?:cpu|gpu|md|py|sh|yaml)\b"
)
MODULE = re.compile(r"^longred_megatron(\.\w+)+$")
SUBCOMMANDS = re.compile(r"\{([\w,-]+)\}\s+\.\.\.")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in the fenced shell blocks, without the usage brackets of `[--flag N]`."""
    for language, body in FENCE.findall(text):
        if language not in SHELL_LANGUAGES:
            continue
        for line in body.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
            for part in re.split(r"\s(?:&&|\|\||\||;)\s", command):
                yield shlex.split(part.replace("[", " ").replace("]", " ").replace("'", "").replace('"', ""))


def tool_call(words: list[str]) -> tuple[str, list[str]] | None:
    """("tools/x.py" or "longred_megatron.x", its arguments), or None where no tool of ours is called."""
    for position, word in enumerate(words):
        if (match := TOOL.match(word)) and words[0] not in {"cat", "git", "less", "ls", "vi"}:
            return match[1], words[position + 1 :]
        if MODULE.match(word) and position and words[position - 1] == "-m":
            return word, words[position + 1 :]
    return None


def make_targets(text: str) -> set[str]:
    """Targets of `make x` in inline code and in fenced shell blocks."""
    inline = set(re.findall(r"`make ([a-z][\w-]*)[^`\n]*`", FENCE.sub("", text)))
    fenced = {words[1] for words in commands(text) if len(words) > 1 and words[0] == "make"}
    return inline | fenced


def unknown_arguments(call: list[str], help_of: Callable[..., str]) -> list[str]:
    """Sub-commands and flags of a call (tool, then arguments) that the tool's own help does not have."""
    tool, *arguments = call
    text = help_of(tool)
    if (found := SUBCOMMANDS.search(text)) and arguments and not arguments[0].startswith("-"):
        # "convert|verify" in a usage line stands for either.
        named = [name for name in arguments[0].split("|") if name != "..."]
        if missing := [name for name in named if name not in found[1].split(",")]:
            return missing
        text += "".join(help_of(tool, name) for name in named)
    known = set(FLAG.findall(text))
    used = [flag for argument in arguments if (flag := argument.split("=")[0]).startswith("--")]
    return [flag for flag in used if flag not in known]


@functools.cache
def help_text(*command: str) -> str:
    """What `tool [sub-command] --help` prints; in this process, so that imports are paid for once."""
    tool, *subcommand = command
    printed = io.StringIO()
    words = mock.patch.object(sys, "argv", [tool, *subcommand, "--help"])
    # Wide, so that argparse does not break a line inside the list of sub-commands.
    wide = mock.patch.dict(os.environ, COLUMNS="1000")
    with words, wide, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        module = runpy.run_path(str(ROOT / tool)) if tool.endswith(".py") else vars(importlib.import_module(tool))
        module["main"]()
    assert ended.value.code == 0, f"{' '.join(command)} --help fails"
    return printed.getvalue()


def documented_calls() -> dict[str, list[tuple[str, list[str]]]]:
    """For each tool: (document, arguments) of every call in the documents."""
    calls: dict[str, list[tuple[str, list[str]]]] = {}
    for path in DOCUMENTS:
        for words in commands(path.read_text()):
            if call := tool_call(words):
                calls.setdefault(call[0], []).append((str(path.relative_to(ROOT)), call[1]))
    return calls


CALLS = documented_calls()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    text = path.read_text()
    named = set(NAMED_FILE.findall(text))
    links = set(re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    missing += sorted(link for link in links if not (path.parent / link).exists())
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not make_targets(path.read_text()) - targets


@pytest.mark.parametrize("tool", sorted(CALLS))
def test_flags_in_documents_are_known_to_the_tool(tool: str) -> None:
    problems = [
        f"{document}: {tool} {' '.join(arguments)}: {', '.join(unknown)}"
        for document, arguments in CALLS[tool]
        if (unknown := unknown_arguments([tool, *arguments], help_text))
    ]
    assert not problems, "\n".join(problems)


def undocumented_keys(section: str, kind: type[Objective], names: set[str]) -> Iterator[str]:
    """The keys of `names` that have no row | `key` | default | in a section of docs/objectives.md."""
    for name in sorted(names):
        field = kind.model_fields[name]
        default = "required" if field.is_required() else json.dumps(field.default).strip('"')
        if f"| `{name}` | {default} |" not in section:
            yield f"{name}, default {default}"


def test_every_kind_and_key_and_method_and_run_is_documented() -> None:
    page, *sections = re.split(r"^### ", (ROOT / "docs/objectives.md").read_text(), flags=re.MULTILINE)
    shared = Objective.model_fields
    missing = list(undocumented_keys(page, Objective, {name for name in shared if not shared[name].exclude}))
    for name, kind in KINDS.items():
        section = next((each for each in sections if f"`{name}`" in each.splitlines()[0]), "")
        inherited = {key for key, field in shared.items() if kind.model_fields[key].default == field.default}
        own = kind.model_fields.keys() - inherited - {"kind"}
        missing += [f"{name}: {key}" for key in undocumented_keys(section, kind, own)]
        missing += [f"{name} in the table of kinds"] * (f"`{name}`" not in page)
    readme = (ROOT / "README.md").read_text()
    missing += [f"the method {name}" for name in METHODS if f"| `{name}` |" not in readme]
    rows = "".join(re.findall(r"^\|.*yaml`.*$", readme, re.MULTILINE))
    runs = {path.name for path in (ROOT / "recipes").glob("*.yaml") if "run" in yaml.safe_load(path.read_text())}
    missing += sorted(runs - set(re.findall(r"\w+\.yaml", rows)))
    assert not missing


SAMPLE = """
Run `make test` but do not make haste.
```
make setup && make demo   # then `make tea`
torchrun --nproc-per-node 8 -m longred_megatron.train r.yaml [training.steps=2 ...] --rehearse
$ .venv/bin/python tools/convert.py up|down --hf DIR \\
    --output=DIR [--force]
git log --stat tools/convert.py
```
```yaml
make: nothing
```
"""


def test_commands_are_read_from_documents() -> None:
    assert make_targets(SAMPLE) == {"test", "setup", "demo"}
    assert [call for words in commands(SAMPLE) if (call := tool_call(words))] == [
        ("longred_megatron.train", ["r.yaml", "training.steps=2", "...", "--rehearse"]),
        ("tools/convert.py", ["up|down", "--hf", "DIR", "--output=DIR", "--force"]),
    ]


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["up|down", "--hf", "DIR", "--output=DIR"], []),
        (["--verbose", "--help"], []),
        (["up", "--output", "DIR"], ["--output"]),
        (["sideways", "--hf", "DIR"], ["sideways"]),
        (["down", "--out", "DIR"], ["--out"]),
    ],
)
def test_unknown_arguments_are_found(arguments: list[str], unknown: list[str]) -> None:
    texts = {
        ("tool",): "usage: tool [-h] [--verbose] {up,down} ...\n  -h, --help",
        ("tool", "up"): "usage: tool up [--hf HF]",
        ("tool", "down"): "usage: tool down [--hf HF] [--output OUTPUT]",
    }
    assert unknown_arguments(["tool", *arguments], lambda *command: texts[command]) == unknown
