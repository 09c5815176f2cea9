"""What all tests share: where real data and golden numbers lie, and shape checks switched on for vitrail.nn."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import parity_table
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shapes in signatures are checked while tests run; users pay nothing for them.
install_import_hook("vitrail.nn", "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity", action="store_true", help="only comparisons with other code, shown as a table"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--parity"):
        return
    chosen, others = [], []
    for item in items:
        code = getattr(getattr(item, "function", None), "__code__", None)
        compares = code is not None and parity_table.COMPARERS.intersection(code.co_names)
        (chosen if compares else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    item.user_properties.extend(parity_table.properties())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--parity"):
        return
    reports = [
        report.user_properties
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    terminalreporter.section("parity")
    for line in parity_table.table(reports):
        terminalreporter.write_line(line)


def _beside(name: str) -> Path:
    """A folder of `../shared` beside the checkout, or of the place that VITRAIL_DATA names."""
    told = os.environ.get("VITRAIL_DATA")
    shared = Path(told).parent if told else Path(__file__).parents[2] / "shared"
    return shared / name


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shape checks off: tracers (compile, export) cannot see through them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("VITRAIL_DATA", _beside("data")))
    if not folder.is_dir():
        pytest.skip("no real data: set VITRAIL_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of numbers computed with the authors' own implementations."""
    folder = _beside("golden")
    if not folder.is_dir():
        pytest.skip("no golden numbers beside the checkout")
    return folder


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> Callable[[str], dict[str, Any]]:
    """`golden("pit_ti")` reads that file."""
    return lambda name: json.loads((golden_dir / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def fill(golden_dir: Path) -> ModuleType:
    """The module whose `fill` and `picture` make weights and inputs from names and shapes."""
    spec = importlib.util.spec_from_file_location("golden_fill", golden_dir / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
