"""The edits of `scripts/mutants`: each edit removes what it names, and fails if it no longer applies."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest
from mutation import run
from mutation.catalogue import MUTANTS
from mutation.edits import (
    DoesNotApply,
    Edit,
    body,
    condition,
    drop_call,
    drop_context,
    drop_handler,
    drop_keyword,
    drop_operand,
    drop_statement,
    replace_call,
    replace_expression,
    replace_statement,
    return_now,
)
from mutation.mutant import Change, Mutant, mutated_modules

MODULE = '''
    import os

    class Box:
        """A place for things."""

        def put(self, fd, *, sync=False):
            # The comment goes, the rest stays.
            with self.guard, suppress(OSError):
                os.fsync(fd)
            if fd < 0 or self.closed or fd == self.other:
                raise ValueError("closed")
            try:
                self.open("name", os.O_RDWR | os.O_CREAT | os.O_EXCL, create=True)
            except FileExistsError:
                return None
            else:
                self.count = self.count + 1
            while self.count > 1:
                self.count -= 1
            return self.count if sync else -1

    def outer():
        def inner():
            yield 1
        return inner
'''


def edited(directory: Path, edit: Edit, function: str = "Box.put", text: str = MODULE) -> str:
    """Return the module with one function edited."""
    (directory / "module.py").write_text("def suppress(*kinds): ...\n" + dedent(text))
    mutant = Mutant("the edit", "module.py", function, edit, (), "")
    return mutated_modules(directory, mutant)["module.py"]


@pytest.mark.parametrize(
    ("edit", "gone", "there"),
    [
        (drop_call("os.fsync"), "os.fsync(fd)", "suppress(OSError):\n            pass\n"),
        (drop_statement("self.count = self.count+1"), "self.count + 1", "else:\n            pass\n"),
        (replace_statement("self.count -= 1", "self.count = 0; break"), "-= 1", "self.count = 0\n            break\n"),
        (condition("fd < 0 or self.closed or fd == self.other", "False"), "self.closed", "if False:"),
        (condition("self.count > 1", "IT and sync"), "while self.count > 1:", "while self.count > 1 and sync:"),
        (drop_handler("FileExistsError"), "try:", "create=True)\n        self.count = self.count + 1\n"),
        (drop_context("self.guard"), "self.guard", "with suppress(OSError):\n            os.fsync(fd)"),
        (replace_expression("self.count if sync else -1", "-1"), "if sync", "return -1"),
        (replace_expression("self.count", "self.number"), "self.count", "self.number = self.number + 1"),
        (replace_call("self.open", "IT or 1"), "create=True)\n", "os.O_EXCL, create=True) or 1\n"),
        (drop_keyword("self.open", "create"), "create=True", "os.O_EXCL)\n"),
        (drop_operand("self.closed"), "self.closed", "if fd < 0 or fd == self.other:"),
        (drop_operand("os.O_EXCL"), "os.O_EXCL", "os.O_RDWR | os.O_CREAT,"),
        (drop_operand("os.O_RDWR"), "os.O_RDWR", "os.O_CREAT | os.O_EXCL,"),
        (return_now("fd"), "os.fsync", "sync=False):\n        return fd\n"),
        (body("self.fd = fd\nreturn fd"), "os.fsync", "        self.fd = fd\n        return fd\n"),
    ],
)
def test_an_edit_removes_what_it_names(tmp_path: Path, edit: Edit, gone: str, there: str) -> None:
    """An edit finds its target whatever the layout, and leaves the rest of the module alone."""
    text = edited(tmp_path, edit)
    assert gone not in text
    assert there in text
    assert "A place for things." in text
    assert "yield 1" in text


@pytest.mark.parametrize(
    "edit",
    [
        drop_call("os.fdatasync"),
        drop_statement("self.count = 0"),
        replace_statement("return 1", "return 2"),
        condition("self.closed", "False"),
        drop_handler("KeyError"),
        drop_context("self.lock"),
        replace_expression("os.O_APPEND", "0"),
        replace_call("open", "None"),
        drop_keyword("self.open", "mode"),
        drop_keyword("self.close", "create"),
        drop_operand("os.O_APPEND"),
        drop_operand("sync"),
    ],
)
def test_an_edit_that_finds_nothing_does_not_apply(tmp_path: Path, edit: Edit) -> None:
    """A mutant that a rewording left behind is reported, and never counts as caught."""
    with pytest.raises(DoesNotApply):
        edited(tmp_path, edit)


@pytest.mark.parametrize(
    ("edit", "function", "reason"),
    [
        (return_now(), "Box.get", "has no function Box.get"),
        (return_now(), "put", "has no function put"),
        (replace_expression("-1", "-1"), "Box.put", "changes nothing"),
        (body("raise KeyError"), "Box.put", "adds a raise"),
        (body("assert fd"), "Box.put", "adds a raise"),
        (return_now(), "outer.inner", "a generator would become"),
        (return_now("missing"), "Box.put", "names that it does not define: missing"),
        (body("nonlocal fd"), "Box.put", "would be no Python"),
    ],
)
def test_a_mutant_that_would_fail_by_itself_is_refused(tmp_path: Path, edit: Edit, function: str, reason: str) -> None:
    """A mutant that always raises is refused: any test notices it, so it would prove nothing."""
    with pytest.raises(DoesNotApply, match=reason):
        edited(tmp_path, edit, function)


def test_one_of_several_definitions_may_have_the_mechanism(tmp_path: Path) -> None:
    """A function that is defined for each platform is edited where the edit applies."""
    text = """
        import os
        if os.name == "posix":
            def sync(fd):
                os.fsync(fd)
        else:
            def sync(fd):
                return None
    """
    assert edited(tmp_path, drop_call("os.fsync"), "sync", text).count("pass\n") == 1
    with pytest.raises(DoesNotApply):
        edited(tmp_path, drop_call("os.close"), "sync", text)


def test_every_change_of_a_mutant_is_made(tmp_path: Path) -> None:
    """A mechanism may be in two functions. Both functions lose it, or the mutant does not apply."""
    (tmp_path / "module.py").write_text("def one():\n    return 1\n\ndef two():\n    return 2\n")

    def mutant(module: str) -> Mutant:
        return Mutant("both", "module.py", "one", return_now("3"), (), "", (Change(module, "two", return_now("4")),))

    text = mutated_modules(tmp_path, mutant("module.py"))["module.py"]
    assert (text.count("return 3"), text.count("return 4")) == (1, 1)
    with pytest.raises(DoesNotApply, match=r"there is no module other\.py"):
        mutated_modules(tmp_path, mutant("other.py"))


@pytest.mark.parametrize("options", [["--check"], []])
def test_a_mutant_that_does_not_apply_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """A mutant that does not apply gives exit status 1, and no test runs."""
    monkeypatch.setattr(run, "PACKAGE", tmp_path)
    monkeypatch.setattr(run, "run_tests", lambda *_: pytest.fail("a test was run"))
    monkeypatch.setattr("sys.argv", ["mutants", *options, MUTANTS[0].name])
    assert run.main() == 1
    told = f"DOES NOT APPLY: without {MUTANTS[0].name}: there is no module {MUTANTS[0].module}"
    assert capsys.readouterr().out.splitlines()[0] == told


def test_names_of_mutants_are_unique() -> None:
    """A name on the command line means one mutant."""
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_mutants_that_the_readme_names_are_there() -> None:
    """The README may name another mutant for one without a successor: the one that guards the rest of its mechanism."""
    _, table = (run.ROOT / "scripts" / "mutation" / "README.md").read_text().split("|---|---|")
    named = set(re.findall("`([^`]+)`", table))
    assert named
    assert named <= {mutant.name for mutant in MUTANTS}
