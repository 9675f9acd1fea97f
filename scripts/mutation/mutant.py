"""The mutants, and how their edits change the modules of the package."""

from __future__ import annotations

import ast
import builtins
import copy
import symtable
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mutation.edits import DoesNotApply, Edit, Function


@dataclass(frozen=True, slots=True)
class Change:
    """One edit of one function. The attributes are those of `Mutant`."""

    module: str
    function: str
    edit: Edit


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mechanism that is taken out, and the tests that must notice.

    Attributes:
        name: the mechanism, as it reads behind "without".
        module: a file of the package, such as ``"storage/lock.py"``.
        function: its qualified name in that module, such as ``"FifoMutex.release"`` or ``"outer.inner"``. A module may
            define it once for each platform. Then the edit must apply to at least one of the definitions.
        edit: removes the mechanism. It adds nothing that raises.
        tests: the test files that must notice.
        select: an expression for pytest's ``-k`` that selects among their tests.
        also: further edits without which the mechanism would still be there.
    """

    name: str
    module: str
    function: str
    edit: Edit
    tests: tuple[str, ...]
    select: str
    also: tuple[Change, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        return (Change(self.module, self.function, self.edit), *self.also)


def mutated_modules(package: Path, mutant: Mutant) -> dict[str, str]:
    """Return the new source of each module that the mutant changes.

    Raises:
        DoesNotApply: an edit finds no place in its function, or the result would fail whatever the tests guard.
    """
    changes: dict[str, list[Change]] = {}
    for change in mutant.changes:
        changes.setdefault(change.module, []).append(change)
    return {module: _mutated(package / module, made) for module, made in changes.items()}


def _mutated(path: Path, changes: list[Change]) -> str:
    try:
        source = path.read_text()
    except FileNotFoundError:
        raise DoesNotApply(f"there is no module {changes[0].module}") from None
    tree = ast.parse(source)
    if not _comes_back(source):
        # The tests could then fail for another reason than the edit.
        raise DoesNotApply(f"{changes[0].module} does not come back the same from ast.unparse")
    for change in changes:
        _apply(tree, change)
    new = ast.unparse(tree)
    try:
        compile(new, str(path), "exec")
    except SyntaxError as error:
        raise DoesNotApply(f"{changes[0].module} would be no Python: {error}") from None
    if unknown := _undefined(new) - _undefined(source):
        raise DoesNotApply(f"{changes[0].module} would use names that it does not define: {', '.join(sorted(unknown))}")
    return new


@cache
def _comes_back(source: str) -> bool:
    tree = ast.parse(source)
    return ast.dump(ast.parse(ast.unparse(tree))) == ast.dump(tree)


def _apply(tree: ast.Module, change: Change) -> None:
    where, reasons = f"{change.module}, {change.function}", []
    definitions = [function for name, function in _functions(tree) if name == change.function]
    if not definitions:
        raise DoesNotApply(f"{change.module} has no function {change.function}")
    for function in definitions:
        edited = copy.deepcopy(function)
        try:
            change.edit(edited)
            _require_sound(function, edited)
        except DoesNotApply as reason:
            reasons.append(reason)
        else:
            vars(function).update(vars(edited))
    if len(reasons) == len(definitions):
        raise DoesNotApply(f"{where}: {reasons[0]}")


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield all functions of a module, with their qualified names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        inner = f"{prefix}{child.name}." if isinstance(child, Function | ast.ClassDef) else prefix
        yield from _functions(child, inner)


def _require_sound(before: Function, after: Function) -> None:
    """Refuse an edit that changes nothing, or that makes the function raise, because any test would notice that."""
    if ast.unparse(after) == ast.unparse(before):
        raise DoesNotApply("the edit changes nothing")
    if _all(after, ast.Raise, ast.Assert) - _all(before, ast.Raise, ast.Assert):
        raise DoesNotApply("the edit adds a raise; a mutant removes a mechanism")
    if bool(_all(after, ast.Yield, ast.YieldFrom)) != bool(_all(before, ast.Yield, ast.YieldFrom)):
        raise DoesNotApply("a generator would become a plain function, or the other way round")


def _all(function: Function, *kinds: type[ast.AST]) -> Counter[str]:
    """Return the nodes of some kinds, as texts, and how often each is there."""
    return Counter(ast.unparse(node) for node in ast.walk(function) if isinstance(node, kinds))


@cache
def _undefined(source: str) -> set[str]:
    """Return the global names that a module uses, but neither defines nor finds among the built-in ones."""
    top = symtable.symtable(source, "module", "exec")
    own = {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
    return set(_globals_used_in(top)) - own - vars(builtins).keys()


def _globals_used_in(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _globals_used_in(child)
