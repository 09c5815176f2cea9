"""Recording a forward pass: it changes nothing, leaves nothing, and tells what an explicit computation tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vitrail.explain.capture import capture, evaluation, gaze, listen, stages_of
from vitrail.models import registry
from vitrail.nn.attention import Attention
from vitrail.nn.block import ParallelBlock
from vitrail.nn.entry import Patchify, PrefixTokens
from vitrail.nn.trunk import Stage


def tiny(family: str) -> Any:
    """A family's smallest network, seeded, in evaluation mode."""
    module = registry.module_of(family)
    torch.manual_seed(0)
    return registry.from_config(next(iter(module.VARIANTS)), module.TINY).eval()


FAMILIES = [family for family in sorted(registry.families()) if stages_of(tiny(family))]
"""Those made of stages; residual networks of convolutions are not."""


def images(network: Any, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, network.config.in_chans, *network.config.img_size, generator=generator)


def hooks(network: nn.Module) -> int:
    """All hooks that a network carries."""
    return sum(
        len(store)
        for module in network.modules()
        for name, store in vars(module).items()
        if name.endswith("_hooks") and store is not None
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_no_bit_and_leaves_nothing(family: str) -> None:
    network = tiny(family)
    batch, before = images(network), hooks(network)
    with torch.no_grad():
        plain = network(batch)
        with capture(network) as recording:
            recorded = network(batch)
        assert torch.equal(plain, recorded)
        assert recording.output is recorded
        assert torch.equal(network(batch), plain)
    assert hooks(network) == before
    assert len(recording.blocks) == network.depth
    assert all(not parameter.grad_fn for parameter in network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_mixed_again_give_what_the_mixer_gave(family: str) -> None:
    network = tiny(family)
    with torch.no_grad(), capture(network) as recording:
        network(images(network))
        for record in (mixer for block in recording.blocks for mixer in block.mixers):
            weights = record.weights()
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
            mixer: Any = record.module
            torch.testing.assert_close(
                mixer.mix(weights, *record.arguments), mixer(*record.arguments), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_says_where_it_looks(family: str) -> None:
    network = tiny(family)
    with torch.no_grad(), capture(network) as recording:
        network(images(network, 1))
    for block in recording.blocks:
        look = gaze(block)
        assert look is not None
        assert look.maps.shape[1:] == tuple(block.grid)
        assert float(look.maps.min()) >= 0 and bool((look.maps.sum(dim=(1, 2)) <= 1 + 1e-5).all())
        assert look.token == (block.prefix > 0)


def test_mixers_side_by_side_are_all_seen() -> None:
    torch.manual_seed(0)
    mixers = [Attention(8, 2), Attention(8, 2)]
    block = ParallelBlock(8, mixers, 16)
    stage = Stage(Patchify(3, 8, (4, 4)), [block])
    with torch.no_grad(), capture(stage) as recording:
        stage(torch.randn(1, 3, 8, 8), None)
    look = gaze(recording.blocks[0])
    assert look is not None and look.maps.shape == (4, 2, 2)
    assert [record.module for record in recording.blocks[0].mixers] == mixers


def test_attention_equals_an_explicit_computation() -> None:
    network = tiny("vit")
    with torch.no_grad(), capture(network) as recording:
        network(images(network, 1))
        block = recording.blocks[0]
        mixer: Any = block.mixers[0].module
        tokens = block.mixers[0].arguments[0][0].double()
        joint = tokens @ mixer.qkv.weight.double().t() + mixer.qkv.bias.double()
        width = tokens.shape[1] // mixer.heads
        look = gaze(block)
    assert look is not None
    for head in range(mixer.heads):
        queries = joint[:, head * width : (head + 1) * width]
        keys = joint[:, tokens.shape[1] + head * width : tokens.shape[1] + (head + 1) * width]
        wanted = (queries @ keys.t() / width**0.5).softmax(dim=1)[0]
        torch.testing.assert_close(look.maps[head].flatten().double(), wanted[1:], rtol=1e-5, atol=1e-6)
        assert float(look.elsewhere[head]) == pytest.approx(float(wanted[0]), abs=1e-5)


def test_entries_are_told_in_their_order_with_what_they_did() -> None:
    network = tiny("vit")
    with torch.no_grad(), capture(network) as recording:
        batch = images(network, 1)
        network(batch)
    first, second = recording.entries[:2]
    assert isinstance(first.module, Patchify) and torch.equal(first.map_before, batch)
    assert (
        isinstance(second.module, PrefixTokens) and second.prefix_before is None and second.prefix is not None
    )
    rows, columns = first.module.patch
    patch = batch[0, :, :rows, :columns].flatten()
    projection: Any = first.module.proj
    wanted = projection.weight.flatten(1) @ patch + projection.bias
    torch.testing.assert_close(first.map[0, :, 0, 0], wanted, rtol=1e-4, atol=1e-5)


def test_a_second_pass_replaces_the_first() -> None:
    network = tiny("vit")
    with torch.no_grad(), capture(network) as recording:
        network(images(network, 1))
        network(images(network, 2))
    assert len(recording.blocks) == network.depth
    assert recording.blocks[0].tokens.shape[0] == 2


def test_hooks_go_also_when_the_network_fails() -> None:
    network = tiny("vit")
    before = hooks(network)
    with pytest.raises(RuntimeError), capture(network):
        network(torch.zeros(1, 7, 32, 32))
    assert hooks(network) == before


def test_gradients_flow_through_what_is_recorded() -> None:
    network = tiny("vit")
    nn.init.normal_(network.get_classifier().weight)
    with capture(network) as recording:
        output = network(images(network, 1))
    tokens = recording.blocks[0].tokens
    gradient = torch.autograd.grad(output[0, 0], tokens)[0]
    assert gradient.shape == tokens.shape and bool(gradient.abs().sum() > 0)


def test_a_listener_may_put_something_in_an_outputs_place() -> None:
    layer = nn.Linear(2, 2)
    with listen({"layer": layer}, lambda name, module, arguments, output: output * 0):
        assert not layer(torch.ones(1, 2)).any()
    assert layer(torch.ones(1, 2)).any()


def test_evaluation_gives_every_module_its_mode_back() -> None:
    network = tiny("vit")
    network.train()
    network.backbone.eval()  # a frozen backbone, as in a linear probe
    with evaluation(network):
        assert not any(module.training for module in network.modules())
    assert network.training and network.head.training and not network.backbone.training
