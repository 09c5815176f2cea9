"""One service for all tests that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.service import Running, running, save_model

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with other weights."""
    place = tmp_path_factory.mktemp("models")
    return save_model(place / "first", 0), save_model(place / "second", 1)


@pytest.fixture(scope="session")
def service(folders: tuple[Path, Path]) -> Iterator[Running]:
    """Both of them, served."""
    with running(*map(str, folders), body_megabytes=2, megapixels=1.0) as found:
        yield found
