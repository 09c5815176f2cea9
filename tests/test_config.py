"""Records from plain data and back, with errors that name the field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from vitrail.config import from_dict, override, read_toml, to_dict, toml_text
from vitrail.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    size: tuple[int, int] = (2, 3)
    limit: int | None = None
    on: bool = False
    inner: Inner = Inner()


def test_a_record_survives_toml(tmp_path: Path) -> None:
    record = Outer(
        name='quo"te\n', kind="y", size=(4, 5), limit=3, on=True, inner=Inner(rate=1e-4, sizes=(1, 2))
    )
    (tmp_path / "r.toml").write_text(toml_text(to_dict(record)), encoding="utf-8")
    assert from_dict(Outer, read_toml(tmp_path / "r.toml")) == record
    assert from_dict(Outer, to_dict(record)) == record


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nme": "b"}, "nme is no field of Outer. Did you mean name"),
        ({"kind": "z"}, "kind takes one of x, y; got 'z'"),
        ({"size": [1, 2, 3]}, "size takes"),
        ({"limit": "3"}, "limit takes a whole number or none; got '3'"),
        ({"on": 1}, "on takes true or false; got 1"),
        ({"inner": {"rate": "fast"}}, "inner.rate takes a number; got 'fast'"),
    ],
)
def test_an_error_names_the_field_and_what_it_takes(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_dict(Outer, values)


def test_dotted_names_reach_inner_records() -> None:
    assert override(Outer(), {"inner.rate": 2, "name": "b"}) == Outer(name="b", inner=Inner(rate=2.0))
    with pytest.raises(ConfigError, match="Did you mean rate"):
        override(Outer(), {"inner.rat": 2})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="is not a TOML file"):
        read_toml(tmp_path / "r.toml")
    with pytest.raises(ConfigError, match="There is no file"):
        read_toml(tmp_path / "none.toml")
