"""The fixture that gives each test a project of a few files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from harness.faults import quick_directory
from harness.projects import Project


@pytest.fixture
def project() -> Iterator[Callable[..., Project]]:
    """Return a function that writes a project from file names without ``.py`` and their texts.

    The project is in memory where that is possible, because no promise here concerns a disk.
    """
    with quick_directory() as directory:

        def make(**files: str) -> Project:
            made = Project(directory)
            for name, text in files.items():
                made.write(name, text)
            return made

        yield make
