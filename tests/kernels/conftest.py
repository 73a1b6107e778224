"""Fixtures of the kernel tests: every instruction set that this host can run, one test each."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

import kt_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `reference` is imported by name, wherever pytest starts
from reference import ISAS

# Tests of several files run side by side, and the matrices are small: torch's own threads would only wait for cores.
torch.set_num_threads(1)


@pytest.fixture(params=kt_kernels.compiled_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """A compiled instruction set; those that this CPU lacks are skipped by name."""
    name: str = request.param
    if name not in ISAS:
        pytest.skip(
            f"{name} is built in, but this CPU or system cannot run it (usable: {', '.join(kt_kernels.isas())})"
        )
    return name


@pytest.fixture(params=["AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT"])
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure tells the line that runs this test alone, with one object compiled again."""
    report = yield
    if report.failed:
        report.sections.append(("alone", f"make dev && .venv/bin/python -m pytest '{item.nodeid}'"))
    return report
