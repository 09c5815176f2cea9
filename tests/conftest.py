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
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shapes in signatures are checked while tests run; users pay nothing for them.
install_import_hook("vitrail.nn", "beartype.beartype")


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
