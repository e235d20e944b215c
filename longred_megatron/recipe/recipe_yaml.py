"""YAML as recipes use it: numbers as people write them, duplicate keys reported, doubtful texts quoted.

ruamel.yaml, which reads YAML 1.2, would need as much code of our own: it takes 010 for 10 and 2024-01-31 for a date,
and stops at the first duplicate key. It writes `off`, `1:30` and `2e-05` bare, which mean something else to a YAML 1.1
reader, and a text's U+0085 comes back as a space.
"""

import re
from typing import Any

import yaml

# PyYAML follows YAML 1.1, which reads 2e-5 as a text, 1:30 as 90, 010 as 8 and `off` as false.
# The loader knows only null, true / false, decimal integers and floats with or without a dot.
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """Knows the patterns above in place of YAML 1.1's."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent's, but remembers keys that occur twice."""
        first_lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or mapping as key: the parent reports it
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first_lines:
                self.duplicates.append(
                    f"line {line}: key `{key}` was already given in line {first_lines[key]}; keep one"
                )
            first_lines.setdefault(key, line)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either the loader above or a YAML 1.1 reader would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """With escapes where there is a line break: PyYAML folds some into spaces in its other styles."""
        style = '"' if any(character in text for character in "\n\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML document, and a sentence for every key given twice. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.duplicates
    finally:
        loader.dispose()


def dump(values: dict[str, Any]) -> str:
    """YAML in the order of `values`, innermost lists and mappings on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


def explain(error: yaml.YAMLError) -> str:
    """The error in one line, with the line and column it was found at (from 1)."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        context = f" {error.context}" if error.context else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"
    return " ".join(str(error).split())


def key_problems(values: Any, path: str = "") -> list[str]:
    """A sentence for every key that is not a text (a bare 1 or true is a number or a truth value)."""
    if isinstance(values, list):  # of phases
        return [found for i, value in enumerate(values) for found in key_problems(value, f"{path[:-1]}[{i}].")]
    if not isinstance(values, dict):
        return []
    found = []
    for key, value in values.items():
        if not isinstance(key, str):
            found.append(f"`{path}{key}`: key {key!r} is not a text; put it in quotes")
        found += key_problems(value, f"{path}{key}.")
    return found
