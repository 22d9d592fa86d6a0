"""Fixtures of every test: seeds, no network but this machine, memory that shows when unwritten, the real data."""

import ipaddress
import os
import socket
from pathlib import Path

# before any library reads them
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# without it CUDA refuses deterministic matrix products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import random

import numpy as np
import pytest
import torch

from tests.helpers import ROOT

# before anything imports Triton: without a GPU its kernels run in Python
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MISSING_DATA = "data missing: "


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="all the kills of `make soak` instead of three of a kind")


@pytest.fixture(scope="session")
def soak(pytestconfig) -> bool:
    """Whether the long form of the kill tests is asked for."""
    return pytestconfig.getoption("--soak")


@pytest.fixture(autouse=True)
def deterministic():
    """Seeds, and memory from torch.empty filled with NaN, so that an unwritten output fails."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections from the test process to another machine fail."""
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ConnectionRefusedError(f"tests reach no other machine: {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data, LONGSPAN_DATA or ../shared/data; the test is skipped where there is none."""
    folder = Path(os.environ.get("LONGSPAN_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"{MISSING_DATA}no folder {folder}, set LONGSPAN_DATA")
    return folder


@pytest.fixture(scope="session")
def data_file(data_dir):
    """`data_file("enwik8/enwik8_head.xz")` is that file's path; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        path = data_dir / name
        if not path.exists():
            pytest.skip(f"{MISSING_DATA}no {path}")
        return path

    return find


def pytest_collection_modifyitems(items):
    """GPU tests asked for on a machine without one are skipped and say so, as are those of the interpreter on one."""
    has_gpu = torch.cuda.is_available()
    absent, reason = ("interpreter", "kernels are compiled here") if has_gpu else ("gpu", "no CUDA device")
    for item in items:
        if item.get_closest_marker(absent):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """The run ends with the number of tests that found no data."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(MISSING_DATA in str(report.longrepr) for report in skipped)
    terminalreporter.write_sep("-", f"tests skipped for missing data: {count}")


@pytest.fixture
def exact_products():
    """Products of float32 as IEEE has it, whatever another test chose, and as before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
