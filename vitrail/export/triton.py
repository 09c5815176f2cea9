"""A model repository for NVIDIA Triton: ONNX, dynamic batching, class names.

NAME/config.pbtxt      what goes in and comes out, and how requests are batched
NAME/labels.txt        class names, one a line, so that Triton's classification extension answers in words
NAME/1/model.onnx      the graph; clients send uint8 at the model's size
NAME/vitrail.json      the card, for clients that resize as the model wants it

NAME is the folder's own: the configuration leaves it to Triton, so that a folder may be given another.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vitrail.errors import WeightsError
from vitrail.export.manifest import OUTPUTS, Manifest

GRAPH = Path("1") / "model.onnx"
CARD = "vitrail.json"

FILES = ("config.pbtxt", "labels.txt", CARD, "1", "1/model.onnx", "1/model.onnx.data")
"""All that is written into a folder; the last only where the weights are large."""


def write_triton(onnx: Path, folder: Path, manifest: Manifest, *, batch: int = 32, delay: int = 2000) -> None:
    """Lay out the repository of one model around an ONNX file named model.onnx, which is copied.

    batch: the largest batch that Triton builds; delay: microseconds that a request waits for others.
    """
    (folder / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(onnx, folder / GRAPH)
    beside = onnx.with_name(onnx.name + ".data")
    if beside.exists():
        shutil.copyfile(beside, folder / "1" / beside.name)
    labels = manifest.card.labels or ()
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in labels), encoding="utf-8")
    (folder / CARD).write_text(json.dumps(json.loads(manifest.to_text()), indent=2) + "\n", encoding="utf-8")
    (folder / "config.pbtxt").write_text(config_text(manifest, batch, delay), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises WeightsError where there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{folder / CARD} cannot be read ({error}); export the model again.") from None
    return Manifest.from_text(text, str(folder / CARD))


def config_text(manifest: Manifest, batch: int, delay: int) -> str:
    """config.pbtxt, as Triton's model configuration describes it. Sizes leave out the batch."""
    wanted, classes = manifest.card.preprocessing, manifest.card.num_classes or -1
    size = (-1, -1) if manifest.free_size else wanted.input_size
    named = '\n    label_filename: "labels.txt"' if manifest.card.labels else ""
    outputs = ",\n".join(
        f'  {{\n    name: "{output}"\n    data_type: TYPE_FP32\n    dims: [{classes}]'
        f"{named if output == 'probabilities' else ''}\n  }}"
        for output in OUTPUTS
    )
    preferred = sorted({1 << power for power in range(1, 12) if 1 << power <= batch})
    return f"""backend: "onnxruntime"
max_batch_size: {batch}
input [
  {{
    name: "images"
    data_type: TYPE_UINT8
    dims: {[wanted.in_chans, *size]}
  }}
]
output [
{outputs}
]
dynamic_batching {{
  preferred_batch_size: {preferred}
  max_queue_delay_microseconds: {delay}
}}
instance_group [ {{ kind: KIND_AUTO }} ]
"""
