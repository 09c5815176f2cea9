"""Peers are the very network that is measured: found in each package that has it, and of its size."""

from __future__ import annotations

import pytest
import torch

from vitrail.jobs import bench
from vitrail.models.registry import create_model

BOTH = ["timm", "transformers"]


@pytest.mark.parametrize(
    ("name", "peers"),
    [
        ("vit_tiny_patch16_224", BOTH),
        ("deit_tiny_distilled_patch16_224", BOTH),
        ("deit_tiny_patch16_224", BOTH),
        ("deit3_small_patch16_224", ["timm"]),
        ("cait_xxs24_224", ["timm"]),
        ("pit_ti_224", ["timm"]),
        ("pvt_tiny", ["transformers"]),
        ("pvt_v2_b0", BOTH),
        ("swin_tiny_patch4_window7_224", BOTH),
        ("swinv2_tiny_window8_256", BOTH),
        ("resnet18", ["timm"]),
        ("legacy_seresnet50", ["timm"]),
        ("t2t_vit_7", []),
        ("detr_resnet50", []),
    ],
)
def test_peers_have_as_many_parameters(name: str, peers: list[str]) -> None:
    for package in BOTH:
        pytest.importorskip(package, reason=f"{package} comes with the extra `peers`")
    with torch.device("meta"):
        ours = create_model(name)
        assert bench.peers_of(ours) == peers
        for maker in peers:
            subject = bench.Subject(
                maker=maker, model=name, img_size=ours.config.img_size, batch_size=1, device="meta",
                precision="fp32", compile=False,
            )  # fmt: skip
            theirs = bench.build(subject)
            counts = [sum(one.numel() for one in network.parameters()) for network in (ours, theirs)]
            assert counts[0] == counts[1], maker
