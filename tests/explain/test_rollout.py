from __future__ import annotations

import pytest
import torch

from tests.explain import reference
from tests.explain.families import FAMILIES, pictures, tiny
from vitrail.explain.attention import explicit
from vitrail.explain.methods import methods_for
from vitrail.explain.rollout import Rows, attention, carried_back, reading, relevance, rollout

FOLLOWED = [family for family in FAMILIES if "rollout" in methods_for(tiny(family))]
"""Families whose tokens can be followed through every block."""


def reader(model: torch.nn.Module, found: object) -> torch.Tensor:
    last = found.moves[-1]
    return reading(model)(last.prefix_after, last.after.size).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_attention_down_changes_no_logit_and_its_rows_are_shares(family: str) -> None:
    model = tiny(family)
    images = pictures(model)
    fast = model(images)
    with explicit(model, gradients=True) as found:
        slow = model(images)
    assert torch.allclose(fast, slow, atol=1e-4, rtol=1e-4)
    for look in found.looks:
        if "nonlocal" not in family:
            assert torch.allclose(look.weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("family", FOLLOWED)
def test_rollout_is_the_product_of_whole_matrices(family: str) -> None:
    model = tiny(family).double()
    images = pictures(model, 1).double()
    with explicit(model) as found, torch.no_grad():
        model(images)
    expected = reference.rollout(model, images, reader(model, found))
    heat = rollout(model, images)
    first = found.moves[0]
    cells = expected[first.prefix_after :].view(1, *first.after)
    assert torch.allclose(heat.values, cells.float(), atol=1e-6)
    assert heat.elsewhere is not None
    assert torch.allclose(heat.values.sum((1, 2)) + heat.elsewhere, torch.ones(1), atol=1e-5)


@pytest.mark.parametrize("family", FOLLOWED)
def test_relevance_is_the_sum_over_paths_of_whole_matrices(family: str) -> None:
    model = tiny(family).double()
    images = pictures(model, 1).double()
    with explicit(model) as found, torch.no_grad():
        model(images)
    expected = reference.relevance(model, images, 3, reader(model, found))
    first = found.moves[0]
    cells = expected[first.prefix_after :].view(1, *first.after).float()
    assert cells.abs().max() > 0
    heat = relevance(model, images, [3])
    assert torch.allclose(heat.values, cells, atol=1e-5 * float(cells.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", FOLLOWED)
def test_raw_attention_is_the_layers_own(family: str) -> None:
    model = tiny(family).double()
    images = pictures(model, 1).double()
    kept = []
    last = [part for part in model.modules() if hasattr(part, "mix")][-1]
    handle = last.register_forward_hook(lambda m, a, o: kept.extend(reference.attention(m, *a)))
    model(images)
    handle.remove()
    heat = attention(model, images)
    rows = kept[0][0].mean(0) @ kept[1]  # [N, N]
    cells = heat.values[0].numel()
    prefix = rows.shape[1] - cells
    shares = reading(model)(prefix, cells).double()
    shares = shares[: rows.shape[0]] if prefix else torch.full((cells,), 1 / cells, dtype=torch.float64)
    assert torch.allclose(heat.values.flatten(), (shares @ rows)[prefix:].float(), atol=1e-6)


def test_identity_rolls_out_to_itself_and_uniform_to_uniform() -> None:
    model = tiny("vit")
    images = pictures(model, 1)
    with explicit(model) as found, torch.no_grad():
        model(images)
    count = found.looks[0].weights.shape[-1]
    whole = torch.eye(count)[None]
    start = Rows(prefix=whole[:, :, :1], cells=whole[:, :, 1:].unflatten(2, tuple(found.moves[0].after)))
    same = carried_back(found, start, lambda look: torch.eye(count)[None], 0.5)
    assert torch.equal(same.tokens, whole)
    even = torch.full((1, count, count), 1 / count)
    rolled = carried_back(found, start, lambda look: even, 0.5).tokens
    stays = 0.5 ** len(found.looks)
    assert torch.allclose(rolled, stays * whole + (1 - stays) * even, atol=1e-6)
    real = carried_back(found, start, lambda look: look.weights.mean(1), 0.5).tokens
    assert torch.allclose(real.sum(-1), torch.ones(()), atol=1e-5)


def test_patches_that_change_places_with_their_positions_take_the_map_with_them() -> None:
    model = tiny("vit", position="none", class_token=True)
    images = pictures(model, 1)
    swapped = images.roll(8, dims=3)  # a patch of 8 to the right, round the border
    assert torch.allclose(
        rollout(model, images).values.roll(1, dims=2), rollout(model, swapped).values, atol=1e-5
    )


def test_tokens_before_the_patches_are_told_apart() -> None:
    model = tiny("deit")
    images = pictures(model, 1)
    both = rollout(model, images)
    one, other = (rollout(model, images, token=name) for name in ("class", "distillation"))
    assert not torch.allclose(one.values, other.values)
    assert torch.allclose((one.values + other.values) / 2, both.values, atol=1e-6)
