"""`vitrail models`: what there is, with what it costs; counted on torch's meta device, without memory."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vitrail.config import to_dict
from vitrail.errors import ModelError, suggestion
from vitrail.models import registry
from vitrail.runs import ModelsRun
from vitrail.weights.card import Card
from vitrail.weights.folder import read_card
from vitrail.weights.shipped import names

RULE = "GFLOPs: multiply-adds of matrix products and convolutions, in 10^9, one image (the papers' way)"

TABLE = Path(__file__).with_name("costs.json")


class Cost(NamedTuple):
    """What one network costs."""

    parameters: int
    multiply_adds: int
    """For one image, forward."""

    @property
    def gflops(self) -> float:
        """In the papers' unit: 10^9 multiply-adds."""
        return self.multiply_adds / 1e9


class Row(NamedTuple):
    """One line of the list."""

    name: str
    family: str
    parameters: int
    gflops: float
    input_size: tuple[int, int]


def models(run: ModelsRun) -> list[Row]:
    """The networks whose names match, sorted. Raises ModelError when there is none."""
    names = registry.list_models(run.pattern)
    if not names:
        near = suggestion(run.pattern, registry.list_models())
        raise ModelError(f"No model matches {run.pattern!r}.{near} `vitrail models` lists them all.")
    return [row(name) for name in names]


def shipped(run: ModelsRun) -> list[tuple[str, Card]]:
    """Names and cards of the models that ship with weights, of the networks whose names match."""
    networks = set(registry.list_models(run.pattern))
    cards = [(name, read_card(name)) for name in names()]
    return [(name, card) for name, card in cards if card.architecture in networks]


def row(name: str) -> Row:
    """One network: from the table of counts where it stands there, else counted now."""
    config = registry.variant(name)
    found = counted().get(name)
    known = Cost(*found[:2]) if found is not None and found[2] == digest(config) else count(name)
    family = registry.family_name(registry.family_of(name))
    return Row(name, family, known.parameters, known.gflops, config.img_size)


def count(name: str, config: Any = None) -> Cost:
    """One network, built on the meta device and counted, in a configuration of its own if one is given."""
    config = config or registry.variant(name)
    with torch.device("meta"):
        model = registry.from_config(name, config)
    return cost(model, config.img_size, config.in_chans)


@functools.cache
def counted() -> dict[str, tuple[int, int, str]]:
    """The table of counts, so that the list comes at once: parameters, multiply-adds, digest of the config."""
    read = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: (counts[0], counts[1], counts[2]) for name, counts in read.items()}


def write_table() -> None:
    """Count every network anew (`make costs`); a test compares the table with the networks."""
    lines = []
    for name in registry.list_models():
        found = count(name)
        lines.append(
            f'"{name}": [{found.parameters}, {found.multiply_adds}, "{digest(registry.variant(name))}"]'
        )
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def digest(config: Any) -> str:
    """A few letters that change when a variant's configuration does."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:8]


def cost(model: nn.Module, img_size: tuple[int, int], in_chans: int = 3) -> Cost:
    """Parameters and multiply-adds at an image size (RULE); biases, norms and activations are not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, in_chans, *img_size, device=device))
    model.train(training)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)
