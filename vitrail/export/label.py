"""What travels inside an exported file: the card, and what must be known of the file itself.

One JSON text under the key `vitrail`: ONNX keeps it among its metadata properties, OpenVINO in rt_info, torch
in an extra file of the archive, the Triton repository in `vitrail.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrail.errors import WeightsError
from vitrail.weights.card import Card

KEY = "vitrail"
"""Name under which the text is kept."""

FORMAT = 1

OUTPUTS = ("logits", "probabilities")
"""Names of the outputs of a classifier."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Of one exported file."""

    card: Card
    """Class names, preprocessing, origin and scores, as in the model folder."""
    precision: str = "fp32"
    """fp32, bf16 or int8: what the file itself holds."""
    free_size: bool = False
    """Whether height and width are free; the batch always is."""
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
            "outputs": list(self.outputs),
            "normalised_inside": self.normalised_inside,
            "source_sha256": self.source_sha256,
            "quantisation": dict(self.quantisation),
            "proof": dict(self.proof),
        }
        return json.dumps(view, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str, where: str) -> Label:
        """Raises WeightsError for a text that vitrail did not write."""
        try:
            view = json.loads(text)
            if view["format"] != FORMAT:
                raise WeightsError(
                    f"{where} has export format {view['format']}, this version reads {FORMAT}: export it again."
                )
            return cls(
                card=Card.from_json(view["card"]),
                precision=str(view["precision"]),
                free_size=bool(view["free_size"]),
                outputs=tuple(map(str, view.get("outputs", OUTPUTS))),  # older files hold classifiers
                normalised_inside=str(view["normalised_inside"]),
                source_sha256=str(view["source_sha256"]),
                quantisation=dict(view["quantisation"]),
                proof=dict(view["proof"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{where} carries a card that cannot be read ({error}); export it again."
            ) from None
