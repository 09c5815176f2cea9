"""Families of other packages, by `package.module:variant`: built like ours, or refused with what they lack."""

from __future__ import annotations

import pytest

from vitrail.errors import ModelError
from vitrail.models.registry import create_model


def test_a_family_is_found_by_its_module() -> None:
    assert create_model("vitrail.models.pit:pit_nano_32").name == "pit_nano_32"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "vitrail.models.vit:vit_nano_patch4_33",
            r"no model 'vit_nano_patch4_33' in vitrail.* Did you mean vit_nano",
        ),
        ("os:path", "os is no family of networks: it lacks Config, build, VARIANTS, CARDS, RENAMES"),
        ("no_such_package.models:vit", "cannot be imported"),
        (":vit", "cannot be imported"),
        (".models:vit", "cannot be imported"),
    ],
)
def test_what_is_no_family_is_refused(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        create_model(name)
