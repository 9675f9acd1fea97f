"""A project of a few files to each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from harness.faults import quick_directory
from harness.projects import Project


@pytest.fixture
def project() -> Iterator[Callable[..., Project]]:
    """Write a project: file name without ``.py`` -> text.

    In memory where that is possible: no promise here is of a disk.
    """
    with quick_directory() as directory:

        def make(**files: str) -> Project:
            made = Project(directory)
            for name, text in files.items():
                made.write(name, text)
            return made

        yield make
