"""Edits of a function's syntax tree: each takes one mechanism out.

An edit changes the function that it is given. It changes each place that matches, in nested functions too. It raises
`DoesNotApply` if no place matches.

Sources are compared as trees. So neither layout nor comments matter, and a string may have either kind of quotes. In a
replacement the name `IT` stands for the expression that is replaced.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from textwrap import dedent
from typing import cast

Function = ast.FunctionDef | ast.AsyncFunctionDef
Edit = Callable[[Function], None]

#: The name that stands for the replaced expression in a replacement.
IT = "IT"


class DoesNotApply(Exception):
    """Raised when a mutant does not fit the package any more. The message says why."""


# --- statements ------------------------------------------------------------------------------------------------------


def drop_call(name: str) -> Edit:
    """Remove each statement that only calls `name`, with any arguments. ``await`` may stand before the call."""

    def dropped(statement: ast.stmt) -> list[ast.stmt] | None:
        if not isinstance(statement, ast.Expr):
            return None
        value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
        return [ast.Pass()] if _calls(value, name) else None

    return _on_statements(dropped, f"no statement is a call of {name}")


def drop_statement(source: str) -> Edit:
    """Remove a statement, with the block that belongs to it."""
    return replace_statement(source, "pass")


def replace_statement(source: str, replacement: str) -> Edit:
    """Put other statements in the place of one."""
    (wanted,), new = _statements(source), _statements(replacement)
    return _on_statements(
        lambda statement: copy.deepcopy(new) if _is_same(statement, wanted) else None, f"no statement is {source!r}"
    )


def condition(source: str, replacement: str) -> Edit:
    """Replace the whole test of an ``if`` or a ``while``. ``"False"`` takes a guard out."""
    wanted, new = _expression(source), _expression(replacement)

    def replaced(statement: ast.stmt) -> list[ast.stmt] | None:
        if not isinstance(statement, ast.If | ast.While) or not _is_same(statement.test, wanted):
            return None
        statement.test = _filled(new, statement.test)
        return [statement]

    return _on_statements(replaced, f"no if or while tests {source!r}")


def drop_handler(exception: str) -> Edit:
    """Remove the handler of an exception, so that the exception passes."""
    wanted = _expression(exception)

    def replaced(statement: ast.stmt) -> list[ast.stmt] | None:
        if not isinstance(statement, ast.Try):
            return None
        handlers = [each for each in statement.handlers if each.type is None or not _is_same(each.type, wanted)]
        if len(handlers) == len(statement.handlers):
            return None
        if handlers:
            statement.handlers = handlers
            return [statement]
        rest = statement.body + statement.orelse
        return [ast.Try(rest, [], [], statement.finalbody)] if statement.finalbody else rest

    return _on_statements(replaced, f"nothing catches {exception}")


def drop_context(source: str) -> Edit:
    """Run a block of ``with`` without one of its context managers. The source leaves the ``as`` out."""
    wanted = _expression(source)

    def replaced(statement: ast.stmt) -> list[ast.stmt] | None:
        if not isinstance(statement, ast.With | ast.AsyncWith):
            return None
        items = [each for each in statement.items if not _is_same(each.context_expr, wanted)]
        if len(items) == len(statement.items):
            return None
        if not items:
            return statement.body
        statement.items = items
        return [statement]

    return _on_statements(replaced, f"no with has {source!r}")


# --- expressions -----------------------------------------------------------------------------------------------------


def replace_expression(source: str, replacement: str) -> Edit:
    """Put another expression in the place of one."""
    wanted, new = _expression(source), _expression(replacement)
    return _on_expressions(
        lambda node: _filled(new, node) if _is_same(node, wanted) else None, f"no expression is {source!r}"
    )


def replace_call(name: str, replacement: str) -> Edit:
    """Put an expression in the place of each call of `name`, with any arguments."""
    new = _expression(replacement)
    return _on_expressions(lambda node: _filled(new, node) if _calls(node, name) else None, f"nothing calls {name}")


def drop_keyword(name: str, keyword: str) -> Edit:
    """Call `name` without one of its keyword arguments."""

    def without(node: ast.expr) -> ast.expr | None:
        if not isinstance(node, ast.Call) or not _calls(node, name):
            return None
        rest = [each for each in node.keywords if each.arg != keyword]
        return None if len(rest) == len(node.keywords) else ast.Call(node.func, node.args, rest)

    return _on_expressions(without, f"no call of {name} has the argument {keyword}")


def drop_operand(source: str) -> Edit:
    """Leave one operand out of an ``and`` or an ``or``, or one flag out of a combination with ``|``."""
    wanted = _expression(source)

    def without(node: ast.expr) -> ast.expr | None:
        if isinstance(node, ast.BoolOp):
            rest = [each for each in node.values if not _is_same(each, wanted)]
            if 0 < len(rest) < len(node.values):
                return rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            if _is_same(node.right, wanted):
                return node.left
            if _is_same(node.left, wanted):
                return node.right
        return None

    return _on_expressions(without, f"{source!r} is no operand of and, or, |")


# --- the whole function ----------------------------------------------------------------------------------------------


def body(source: str) -> Edit:
    """Replace the whole body of the function."""
    new = _statements(source)

    def edit(function: Function) -> None:
        function.body = copy.deepcopy(new)

    return edit


def return_now(source: str = "None") -> Edit:
    """Let the function only return a value."""
    return body(f"return {source}")


# --- trees -----------------------------------------------------------------------------------------------------------


def _expression(source: str) -> ast.expr:
    return ast.parse(source.strip(), mode="eval").body


def _statements(source: str) -> list[ast.stmt]:
    return ast.parse(dedent(source)).body


def _is_same(node: ast.AST, wanted: ast.AST) -> bool:
    return type(node) is type(wanted) and _normal(node) == _normal(wanted)


def _normal(node: ast.AST) -> str:
    """Return a text that is equal for equal code. An assignment's target equals the same name where it is read."""
    node = copy.deepcopy(node)
    for each in ast.walk(node):
        if isinstance(each, ast.Name | ast.Attribute | ast.Subscript | ast.Starred | ast.List | ast.Tuple):
            each.ctx = ast.Load()
    return ast.dump(node)


def _calls(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def _filled(replacement: ast.expr, it: ast.expr) -> ast.expr:
    """Return a copy of the replacement in which `IT` is filled in."""

    def filled(node: ast.expr) -> ast.expr | None:
        return copy.deepcopy(it) if isinstance(node, ast.Name) and node.id == IT else None

    # The replacement may be that name alone.
    return cast(ast.expr, _Rewriting(ast.expr, filled).visit(copy.deepcopy(replacement)))


class _Rewriting(ast.NodeTransformer):
    """A transformer that asks `change` about each node of a kind, and puts its answer in the node's place.

    None leaves the node alone.
    """

    def __init__(
        self, kind: type[ast.expr] | type[ast.stmt], change: Callable[..., ast.expr | list[ast.stmt] | None]
    ) -> None:
        self.count = 0
        self._kind = kind
        self._change = change

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        # From the inside to the outside, because a replacement must not be looked at again.
        node = self.generic_visit(node)
        new = self._change(node) if isinstance(node, self._kind) else None
        if new is None:
            return node
        self.count += 1
        return new


def _on_statements(change: Callable[[ast.stmt], list[ast.stmt] | None], otherwise: str) -> Edit:
    return _rewritten(ast.stmt, change, otherwise)


def _on_expressions(change: Callable[[ast.expr], ast.expr | None], otherwise: str) -> Edit:
    return _rewritten(ast.expr, change, otherwise)


def _rewritten(
    kind: type[ast.expr] | type[ast.stmt], change: Callable[..., ast.expr | list[ast.stmt] | None], otherwise: str
) -> Edit:
    def edit(function: Function) -> None:
        rewriting = _Rewriting(kind, change)
        # Not `visit`, because the function itself is a statement, too, and must stay.
        rewriting.generic_visit(function)
        if not rewriting.count:
            raise DoesNotApply(otherwise)

    return edit
