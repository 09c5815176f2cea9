"""What is told of networks and files is true: the table of counts is recounted, a file's names are all told."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from vitrail import create_model
from vitrail.jobs import models
from vitrail.jobs.info import info
from vitrail.models import registry
from vitrail.runs import InfoRun, ModelsRun


def test_the_table_holds_every_network_as_it_is_configured_now() -> None:
    table = models.counted()
    now = {name: models.digest(registry.variant(name)) for name in registry.list_models()}
    stale = sorted(name for name, digest in now.items() if name not in table or table[name][2] != digest)
    assert not stale and set(table) == set(now), f"make costs; stale or missing: {stale[:5]}"


def cheapest() -> list[str]:
    """The network with the fewest parameters of every family."""
    rows = models.models(ModelsRun())
    least: dict[str, models.Row] = {}
    for row in rows:
        if row.family not in least or row.parameters < least[row.family].parameters:
            least[row.family] = row
    return [row.name for row in least.values()]


def test_the_table_is_right_for_one_network_of_every_family() -> None:
    for name in cheapest():
        assert tuple(models.count(name)) == models.counted()[name][:2], f"{name}: make costs"


@pytest.mark.slow
def test_the_table_is_right_for_every_network() -> None:
    for name in registry.list_models():
        assert tuple(models.count(name)) == models.counted()[name][:2], f"{name}: make costs"


def test_multiply_adds_of_a_vit_are_those_of_its_formula() -> None:
    """N = 196 patches and [CLS], D = 384, F = 1536, 12 blocks: projections, attention, MLP, patches, head."""
    tokens, width, hidden = 197, 384, 1536
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    by_hand = 12 * block + 196 * 768 * width + width * 1000
    assert models.count("vit_small_patch16_224").multiply_adds == by_hand


def test_patterns_select_by_shape_or_part() -> None:
    assert [row.name for row in models.models(ModelsRun(pattern="vit_huge_patch14_224"))] == [
        "vit_huge_patch14_224"
    ]
    assert all("patch32" in row.name for row in models.models(ModelsRun(pattern="patch32")))


def test_a_file_that_several_networks_fit_is_told_with_all_their_names(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(create_model("vit_tiny_patch16_224", num_classes=2).state_dict(), path)
    found = info(InfoRun(model=str(path)))
    assert {found.model, *found.also} == {"vit_tiny_patch16_224", "deit_tiny_patch16_224"}
    assert found.fit == 1.0
