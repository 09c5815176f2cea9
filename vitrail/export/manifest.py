"""What travels inside an exported file: the card, and what must be known of the file itself.

One JSON text under the key `vitrail`: ONNX keeps it among its metadata properties, OpenVINO in rt_info, torch
in an extra file of the archive, the Triton repository in `vitrail.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vitrail.errors import WeightsError
from vitrail.weights.card import Card

KEY = "vitrail"
"""Name under which the text is kept."""

FORMAT = 1

OUTPUTS = ("logits", "probabilities")
"""Names of the outputs of a classifier."""


class Sizes(NamedTuple):
    """Heights or widths, in pixels, that a graph holds for."""

    least: int = 1
    step: int = 1
    most: int | None = None

    def take(self, pixels: int) -> bool:
        """Whether a number of pixels is one of them."""
        within = self.least <= pixels and (self.most is None or pixels <= self.most)
        return within and (pixels - self.least) % self.step == 0

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        reach = f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"
        return reach if self.step == 1 else f"{reach} in steps of {self.step}"


ANY = Sizes()
"""Every size."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one exported file carries besides its graph."""

    card: Card
    """Class names, preprocessing, origin and scores, as in the model folder."""
    precision: str = "fp32"
    """fp32, bf16 or int8: what the file itself holds."""
    free_size: bool = False
    """Whether height and width are free; the batch always is."""
    rows: Sizes = ANY
    """The heights that it holds for, where they are free."""
    columns: Sizes = ANY
    """The widths."""
    outputs: tuple[str, ...] = OUTPUTS
    """Names of what the file gives, in its order."""
    normalised_inside: str = "folded"
    """folded into the first convolution, or computed: always inside, on uint8."""
    source_sha256: str = ""
    """Hash of the weights that it was made from."""
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    """How int8 was reached: method, calibration, what stayed in float32."""
    proof: Mapping[str, Any] = field(default_factory=dict)
    """The numbers of the proof, once there is one."""

    def to_text(self) -> str:
        """JSON, on one line."""
        view = {
            "format": FORMAT,
            "card": self.card.to_json(),
            "precision": self.precision,
            "free_size": self.free_size,
            "rows": self.rows._asdict(),
            "columns": self.columns._asdict(),
            "outputs": list(self.outputs),
            "normalised_inside": self.normalised_inside,
            "source_sha256": self.source_sha256,
            "quantisation": dict(self.quantisation),
            "proof": dict(self.proof),
        }
        return json.dumps(view, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Raises WeightsError for a text that vitrail did not write, or whose names and classes do not fit."""
        if not text:
            raise WeightsError(
                f"{where} carries no vitrail card: vitrail did not export it, or a program that rewrote it left the"
                " card out. Without one nobody knows its classes and preprocessing: run `vitrail export` on the model"
                " folder, or open the file with its own runtime."
            )
        try:
            view = json.loads(text)
            if view["format"] != FORMAT:
                raise WeightsError(
                    f"{where} has export format {view['format']}, this version reads {FORMAT}: export it again."
                )
            manifest = cls(
                card=Card.from_json(view["card"]),
                precision=str(view["precision"]),
                free_size=bool(view["free_size"]),
                rows=_sizes(view.get("rows", {})),  # older files do not tell
                columns=_sizes(view.get("columns", {})),
                outputs=tuple(map(str, view.get("outputs", OUTPUTS))),  # older files hold classifiers
                normalised_inside=str(view["normalised_inside"]),
                source_sha256=str(view["source_sha256"]),
                quantisation=dict(view["quantisation"]),
                proof=dict(view["proof"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{where} carries a card that cannot be read ({type(error).__name__}: {error}); export it again."
            ) from None
        check_names(manifest.card, where)
        return manifest


def damaged(path: object, error: Exception) -> WeightsError:
    """The error for an exported file that its engine cannot open."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return WeightsError(
        f"{path} cannot be opened ({lines[-1][:160] if lines else type(error).__name__}): it is damaged, or no export"
        " of a model. Export it again, or fetch it again."
    )


def check_names(card: Card, where: str) -> None:
    """Raises WeightsError where a card has more or fewer names than classes."""
    names, classes = card.labels, card.num_classes
    if names is not None and len(names) != classes:
        raise WeightsError(
            f"{where} has {len(names)} class names for {classes} classes: there must be as many. Fix the names in the"
            " model folder's config.json, and export it again."
        )


def _sizes(view: Mapping[str, Any]) -> Sizes:
    found = Sizes(**view)
    if min(found.least, found.step, found.most or 1) < 1:
        raise ValueError(f"sizes begin at 1; got {found}")
    return found
