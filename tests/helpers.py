"""What several test files share: where the project is, and how to run it as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(*args: object, timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
    """Run this interpreter from the project root; `env` adds to the environment. Text output, no check."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
