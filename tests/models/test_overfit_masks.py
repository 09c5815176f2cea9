"""Every segmenter learns eight pictures by heart: what is wired wrongly does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitrail.models import registry
from vitrail.tasks.segment import Segment

SIZE = (64, 64)

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "setr naive": ("setr_pup_large", {
        "decoder": "naive", "growth": (1,), "auxiliary_growth": (1,), "width": 64,
        "backbone_changes": {"patch_size": [8, 8], "width": 64, "depth": 4, "heads": 4, "hidden": 128},
    }),
    "setr pup": ("setr_pup_large", {
        "width": 32, "backbone_changes": {"patch_size": [8, 8], "width": 64, "depth": 4, "heads": 4, "hidden": 128},
    }),
    "setr mla": ("setr_pup_large", {
        "decoder": "mla", "auxiliary": (0, 1), "width": 32, "stream_width": 16,
        "backbone_changes": {"patch_size": [8, 8], "width": 64, "depth": 4, "heads": 4, "hidden": 128},
    }),
    "trans2seg published": ("trans2seg_medium", {"width": 32, "head_width": 16}),
    "trans2seg clean": ("trans2seg_medium", {"width": 32, "head_width": 16, "numerics": "clean"}),
    "fpn pvt": ("fpn_pvt_tiny", {"width": 32, "head_width": 32}),
    "fpn swin": ("fpn_pvt_tiny", {
        "width": 32, "head_width": 32, "norm_maps": True, "backbone": "swin_tiny_patch4_window7_224",
        "backbone_changes": {"width": 16, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]},
    }),
}  # fmt: skip


def smooth(*shape: int) -> torch.Tensor:
    """Noise of a few cells, enlarged to the pictures' size."""
    return F.interpolate(torch.randn(*shape, 4, 4), size=SIZE, mode="bicubic")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", NETWORKS)
def test_learns_eight_pictures_by_heart(kind: str) -> None:
    name, changes = NETWORKS[kind]
    torch.manual_seed(0)
    tiny = registry.family_of(name).TINY
    model = registry.from_config(
        name, registry.changed(tiny, img_size=SIZE, num_classes=4, **changes)
    ).train()
    images, masks = smooth(8, 3), smooth(8, 4).argmax(1)
    masks[:, :4] = 255
    task = Segment("abcd")
    steps = 200 if name.startswith("fpn") else 400
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        terms = task.loss(model(images), masks)
        if step == 0:
            first = float(terms["mask"].detach())
        optimiser.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    last = float(terms["mask"].detach())
    metrics = task.metrics()
    with torch.no_grad():  # in training mode: eight pictures are all that batch norms will ever see
        metrics.add(model(images), masks)
    result = metrics.result()
    print(f"{kind}: loss {first:.3f} to {last:.4f}, mIoU {result['miou']:.4f}")
    assert last < 0.05 * first and result["miou"] > 0.95
