"""What a file hands to Transformer Engine: the names that it imports, and the keywords that it calls with."""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PACKAGE = "transformer_engine"


class Handed(NamedTuple):
    """`to` is a module or a function, by its name; `what` an imported name or a keyword."""

    to: str
    what: str


def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text())


def missing_imports(tree: ast.AST) -> Iterator[Handed]:
    """Names that the file imports, at its top or anywhere in it, and that are not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                try:
                    if not hasattr(importlib.import_module(str(node.module)), alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    yield Handed(str(node.module), alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    try:
                        importlib.import_module(alias.name)
                    except ImportError:
                        yield Handed(alias.name, "")


def keywords(module: ModuleType, tree: ast.AST) -> Iterator[tuple[Callable[..., Any], str]]:
    """(what of Transformer Engine is called, keyword) for each keyword of each call, those of `**settings` too."""
    names = vars(module) | _imports(tree)
    for scope in _functions(tree):
        for call in ast.walk(scope.node):
            if isinstance(call, ast.Call) and (target := _target(call.func, scope.of, names)):
                for keyword in call.keywords:
                    if keyword.arg is not None:
                        yield target, keyword.arg
                    elif isinstance(keyword.value, ast.Name):
                        yield from ((target, key) for key in _keys(keyword.value.id, scope.node))


def unknown(target: Callable[..., Any], keyword: str) -> bool:
    """Whether the function does not take it."""
    parameters = inspect.signature(target).parameters
    return keyword not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


class _Scope(NamedTuple):
    node: ast.AST
    of: ast.ClassDef | None


def _functions(tree: ast.AST, of: ast.ClassDef | None = None) -> Iterator[_Scope]:
    """The outermost functions of the module and of its classes, also of classes inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, node)
        elif isinstance(node, ast.FunctionDef):
            yield _Scope(node, of)
            for inner in ast.walk(node):
                if isinstance(inner, ast.ClassDef):
                    yield from _functions(inner, inner)
        else:
            yield from _functions(node, of)


def _imports(tree: ast.AST) -> dict[str, Any]:
    """What imports anywhere in the file bind, as far as it is there."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            try:
                exec(compile(ast.Module([node], []), "imports", "exec"), names)
            except ImportError:
                continue
    return names


def _target(called: ast.expr, of: ast.ClassDef | None, names: dict[str, Any]) -> Callable[..., Any] | None:
    """What is called, if Transformer Engine defines it."""
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Call):
        found = _of_super(called.value, called.attr, of, names)
    else:
        found = _value(called, names)
    if not callable(found) or not (getattr(found, "__module__", None) or "").startswith(PACKAGE):
        return None
    return found


def _of_super(call: ast.Call, method: str, of: ast.ClassDef | None, names: dict[str, Any]) -> Any:
    if not isinstance(call.func, ast.Name) or call.func.id != "super" or of is None:
        return None
    if call.args:  # super(Class, self): what follows that class
        order = getattr(_value(call.args[0], names), "__mro__", ())[1:]
    else:
        order = [each for base in of.bases for each in getattr(_value(base, names), "__mro__", ())]
    return next((vars(each)[method] for each in order if method in vars(each)), None)


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    if not isinstance(expression, ast.Name | ast.Attribute):
        return None
    try:
        return eval(ast.unparse(expression), names)
    except (AttributeError, NameError):
        return None


def _keys(name: str, scope: ast.AST) -> Iterator[str]:
    """The keys that a function puts into its dictionary of that name."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                    yield from _literal_keys(node.value)
                elif isinstance(target, ast.Subscript) and _is(target.value, name):
                    yield from _constants([target.slice])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{name}.update":
            for argument in node.args:
                yield from _literal_keys(argument)


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _literal_keys(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Dict):
        yield from _constants(value.keys)
    elif isinstance(value, ast.Call) and _is(value.func, "dict"):
        yield from (keyword.arg for keyword in value.keywords if keyword.arg)


def _constants(nodes: list[Any]) -> Iterator[str]:
    yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
