"""What vitrail promises to keep: its public names, and a word about every field of every record."""

from __future__ import annotations

import dataclasses

import pytest

import vitrail
from vitrail import runs
from vitrail.cli import flags
from vitrail.cli.main import COMMANDS

PUBLIC = ["Explainer", "Predictor", "create_model", "explain", "from_pretrained", "is_model", "list_models"]

RECORDS = [getattr(runs, command.record) for command in COMMANDS]


def test_the_public_names() -> None:
    assert vitrail.__all__ == PUBLIC
    assert sorted(vitrail.__all__) == vitrail.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_can_be_had_and_says_what_it_is(name: str) -> None:
    assert getattr(vitrail, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="create_modle"):
        vitrail.create_modle  # noqa: B018


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_of_a_record_is_documented(record: type) -> None:
    notes = flags.documents(record)
    for field in dataclasses.fields(record):
        assert notes[field.name].text.endswith("."), (
            f"{record.__name__}.{field.name} needs a sentence below it"
        )


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_is_frozen_and_takes_keywords_only(record: type) -> None:
    parameters = record.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert all(field.kw_only for field in dataclasses.fields(record))


def test_every_record_is_a_command_and_every_command_a_verb() -> None:
    from vitrail.cli import verbs

    named = {name for name, value in vars(runs).items() if dataclasses.is_dataclass(value)}
    assert named == {command.record for command in COMMANDS}
    assert all(callable(getattr(verbs, command.verb)) for command in COMMANDS)
