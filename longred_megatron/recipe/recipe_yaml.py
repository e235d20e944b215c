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


MAX_BYTES = 2**18  # of a recipe; PyYAML takes seconds for one of this size
_MAX_DEPTH, _MAX_VALUES = 40, 50_000
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


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
    """The value of a YAML document, and a sentence for every key given twice.

    Raises yaml.YAMLError, also for what no recipe needs: tags of Python's objects, merges, nesting by the thousand,
    aliases that multiply or lead to themselves.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        _num_values(node, {}, 0)
        return loader.construct_document(node), loader.duplicates
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, KeyError, OverflowError) as error:  # `!!int x`, a number of 5,000 digits
        raise yaml.YAMLError(f"a value is not what its tag says ({error})") from None
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """The values of a document below `node`, aliases written out. known: of the nodes that have been counted.

    Raises yaml.MarkedYAMLError where `parse` refuses one of them.
    """
    if node in known:
        problem = "an alias leads to itself" if known[node] == 0 else None
    elif node.tag not in _TAGS:
        problem = f"the tag {node.tag!r} has no place in a recipe"
    elif depth > _MAX_DEPTH:
        problem = f"nested more than {_MAX_DEPTH} deep"
    elif isinstance(node, yaml.ScalarNode):
        bad = "\0" in node.value or any("\ud800" <= character <= "\udfff" for character in node.value)
        problem = "a text with a NUL or half of a surrogate pair" if bad else None
        known[node] = 1
    else:
        known[node] = 0  # until it is known
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[node] = 1 + sum(_num_values(part, known, depth + 1) for part in parts)
        problem = f"more than {_MAX_VALUES:,} values" if known[node] > _MAX_VALUES else None
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return known[node]


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
