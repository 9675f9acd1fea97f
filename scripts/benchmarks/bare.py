"""The bare limits: what the system calls of a durable commit cost by themselves."""

from __future__ import annotations

import os
from pathlib import Path


def open_appending(path: Path) -> int:
    """Open a file, made if it is missing, so that each write goes to its end."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def append(fd: int, record: bytes) -> None:
    """Do the least that makes a record durable."""
    os.write(fd, record)
    os.fdatasync(fd)


def replace(path: Path, content: bytes) -> None:
    """Do the least that durably replaces a file: temporary file, fsync, rename, fsync of the directory."""
    temp = path.with_name(f"{path.name}.tmp")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.fsync(fd)
    os.close(fd)
    os.replace(temp, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fsync(fd)
    os.close(fd)
