"""Workers that go through the same steps in processes of their own, and are killed at any moment of them."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

WORKERS = 4
NAMES = [f"w{number}" for number in range(WORKERS)]


def all_worked(directory: Path, *, code: str, steps: int, kills: int) -> dict[str, set[int]]:
    """Run all workers at once, to their ends. Return the steps that each of them has printed.

    Args:
        code: a worker's program. Its arguments are the directory, its name and the number of steps. It prints the
            number of each step that is acknowledged. When it is started again, it goes on behind what is there.
        kills: how many times each worker is killed and started again.
    """
    with ThreadPoolExecutor(WORKERS) as threads:
        printed = threads.map(partial(_worked, directory=directory, code=code, steps=steps, kills=kills), NAMES)
        return dict(zip(NAMES, printed, strict=True))


def _worked(name: str, *, directory: Path, code: str, steps: int, kills: int) -> set[int]:
    chance, printed = random.Random(name), set[int]()
    while True:
        command = [sys.executable, "-c", code, str(directory), name, str(steps)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines_left = chance.randrange(1, steps // 3)
            for line in process.stdout:
                printed.add(int(line))
                lines_left -= 1
                if lines_left == 0 and kills:
                    # The kill comes at any moment of the next step.
                    time.sleep(chance.uniform(0, 0.01))
                    process.kill()
        if process.returncode == 0:
            return printed
        assert process.returncode == -signal.SIGKILL
        kills -= 1
