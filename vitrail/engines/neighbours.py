"""Classes by nearest neighbours: a trained network's vectors and labelled pictures, and no training at all.

The weighted k-NN of DINO (Caron et al. 2021, 2104.14294, section 4.1; after Wu et al. 2018, 1805.01978): pictures are
compared by the cosine of the vectors that the head is given; each of the k nearest labelled pictures votes for its
class with weight exp(cosine / temperature).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.data.transforms import normalise
from vitrail.engines import Engine
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07


def _keys(images: Tensor) -> list[bytes]:
    """What tells the pixels of each picture from others'."""
    return [hashlib.blake2b(image.contiguous().cpu().numpy().tobytes()).digest() for image in images]


class Neighbours:
    """An engine that answers with its neighbours' votes; its classes are those of the labelled pictures.

    Args:
        engine: what computes the vectors; torch, since it holds the network itself.
        batches: labelled pictures (`.images`, `.targets`), prepared as the model's card says.
        classes: names of the classes, in the order of the numbers.
        k: neighbours that vote; all of them where there are fewer pictures.

    A picture never votes for itself: one that is asked for and remembered, pixel for pixel, is asked without itself,
    and counted in `met`.

    Raises:
        ConfigError: another engine, no classifier, k below 1, or no pictures.
    """

    def __init__(self, engine: Engine, batches: Iterable[Any], classes: tuple[str, ...], k: int = 20) -> None:
        if k < 1:
            raise ConfigError(f"Neighbours that vote (knn_k) must be at least 1; got {k}.")
        if not isinstance(engine, TorchEngine) or engine.card.task != "image-classification":
            raise ConfigError(
                f"Neighbours need a classifier on the engine torch; got {engine.card.task} on {engine.name}: take"
                " --engine torch, or a classification model."
            )
        self.engine, self.name, self.precision = engine, "neighbours", engine.precision
        self.classes = len(classes)
        self.card = dataclasses.replace(engine.card, labels=classes, folders=(), ids=())
        vectors, targets = [], []
        self.places: dict[bytes, list[int]] = {}
        self.met = 0
        remembered = itertools.count()
        for batch in batches:
            for key in _keys(batch.images):
                self.places.setdefault(key, []).append(next(remembered))
            vectors.append(self.vectors(batch.images))
            targets.append(batch.targets)
        if not vectors:
            raise ConfigError("There are no labelled pictures to be neighbours.")
        self.memory: Float[Tensor, "M D"] = torch.cat(vectors)
        self.targets: Int[Tensor, " M"] = torch.cat(targets).to(self.memory.device)
        self.k = min(k, len(self.targets))
        logger.info("%d labelled pictures remembered; the %d nearest vote", len(self.targets), self.k)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Float[Tensor, "B D"]:
        """What the head is given for uint8 images `[B, C, h, w]`, at length one, in float32."""
        network, runtime = self.engine.network.eval(), self.engine.runtime
        with runtime.autocast():
            batch = normalise(images.to(runtime.device), self.card.preprocessing)
            pooled = network.forward_head(network.forward_features(batch), pre_logits=True)
        return F.normalize(pooled.float(), dim=1)  # [B, D]

    def __call__(self, images: Tensor) -> Float[Tensor, "B K"]:
        """Logarithms of each class's share of the votes, so that a softmax gives the shares."""
        alike = self.vectors(images) @ self.memory.T  # [B, M]
        for row, key in zip(alike, _keys(images), strict=True):
            if (same := self.places.get(key)) is not None:
                row[same] = -torch.inf
                self.met += 1
        near, index = alike.topk(self.k, dim=1)  # [B, k]
        # Where only the picture itself is known, every weight would be NaN: it has no neighbour.
        weights = torch.softmax(near / TEMPERATURE, dim=1).nan_to_num()  # [B, k]
        shares = weights.new_zeros(len(images), self.classes)
        shares.scatter_add_(1, self.targets[index], weights)
        return shares.clamp_min(1e-6).log()  # [B, K]
