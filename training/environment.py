"""What a run was made with: versions, machine, state of the sources, command line."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "hydra-core", "omegaconf", "safetensors", "transformers", "datasets",
            "tokenizers", "wandb", "tensorboard")  # fmt: skip
MAX_DIFF_BYTES = 1_000_000


def describe_environment() -> tuple[dict[str, Any], str]:
    """(JSON content of env.json, diff of the sources against the last commit, "" where there is none)."""
    import torch  # not above: who only reads a run folder does not wait for it

    sources, diff = _describe_sources()
    environment = {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "git": sources,
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "num_cores": os.cpu_count(),
            "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "memory_bytes": _memory_bytes(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "command": sys.argv,
    }
    return environment, diff


def _describe_sources() -> tuple[dict[str, Any] | None, str]:
    """(commit and what differs from it, the diff cut at 1 MB); (None, "") outside a repository."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, ""
    changed = (git("status", "--porcelain") or "").splitlines()
    diff = (git("diff", "HEAD") or "") if changed else ""
    size = len(diff.encode())
    if size > MAX_DIFF_BYTES:
        kept = diff.encode()[:MAX_DIFF_BYTES].decode(errors="ignore")
        diff = f"{kept}\n[cut: {size:,} bytes in all, the first {MAX_DIFF_BYTES:,} kept]\n"
    return {"commit": commit.strip(), "dirty": bool(changed), "changed_files": changed[:100]}, diff


def git(*arguments: str) -> str | None:
    """What git prints about the repository of these sources, None where it fails or there is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.decode(errors="replace")


def package_version(package: str) -> str | None:
    """Version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
