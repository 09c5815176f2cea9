"""A segmenter's engine over pictures of any size: shape kept, windows averaged, refused for other tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.engines.pytorch import TorchEngine
from vitrail.engines.sliding import SlidingEngine
from vitrail.errors import ConfigError
from vitrail.jobs.predict import predict
from vitrail.models import fpn, registry, vit
from vitrail.runs import PredictRun
from vitrail.tasks.sliding import slide


def segmenter() -> registry.Model:
    torch.manual_seed(0)
    model = registry.from_config("fpn_pvt_tiny", registry.changed(fpn.TINY, img_size=(32, 32))).eval()
    with torch.no_grad():
        model.head.linear.weight.normal_()
    return model


def test_slides_the_engines_own_window() -> None:
    engine = TorchEngine(segmenter(), device="cpu", precision="fp32")
    sliding = SlidingEngine(engine, 48)
    wanted = sliding.card.preprocessing
    assert (wanted.crop_mode, min(wanted.input_size)) == ("fit", 48) and sliding.window == (32, 32)
    images = torch.randint(0, 255, (1, 3, 48, 70), dtype=torch.uint8)
    logits = sliding(images).logits
    assert logits.shape == (1, 5, 48, 70)
    assert torch.equal(logits, slide(engine, images, (32, 32)))


def test_other_tasks_have_no_window() -> None:
    network = registry.from_config("vit_tiny_patch16_224", vit.TINY)
    with pytest.raises(ConfigError, match="for masks alone"):
        SlidingEngine(TorchEngine(network, device="cpu"), 48)


def test_predict_takes_a_window(tmp_path: Path) -> None:
    segmenter().save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    run = PredictRun(
        model=str(tmp_path / "model"), images=(str(tmp_path / "street.png"),), draw=str(tmp_path / "drawn"),
        device="cpu", precision="fp32",
    )  # fmt: skip
    masks = {}
    for window in (0, 40):
        (record,) = list(predict(PredictRun(**{**vars(run), "window": window})))
        assert record.mask.shape == (40, 90)
        masks[window] = record.mask
    assert not torch.equal(masks[0], masks[40])
    engine = SlidingEngine(TorchEngine(tmp_path / "model", device="cpu", precision="fp32"), 40)
    logits = engine(torch.from_numpy(pixels).permute(2, 0, 1)[None]).logits
    assert torch.equal(logits.argmax(1)[0].to(torch.uint8), masks[40])
