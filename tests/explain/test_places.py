"""Where cells lie: told by the parts, checked by which pixels really reach them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.explain.families import FAMILIES, pictures, tiny
from vitrail.data.image import decode
from vitrail.data.transforms import Preprocess
from vitrail.explain.attention import explicit, last_map, slid
from vitrail.explain.capture import stages_of
from vitrail.explain.heat import Heat
from vitrail.explain.overlay import on_picture
from vitrail.explain.places import PIXELS, Placement, axes, joined, keys_of, reaches, sliding
from vitrail.explain.trace import trace
from vitrail.models import registry
from vitrail.nn.bit import BitStem, StandardConv, pad_same
from vitrail.nn.reduction import SpatialReduction
from vitrail.nn.resnet import FrozenBatchNorm, Stem
from vitrail.nn.shapes import Grid
from vitrail.nn.window import RelativeTable, WindowAttention
from vitrail.tasks.classify import Classify

STAGED = [family for family in FAMILIES if stages_of(tiny(family))]
PLAIN = [family for family in FAMILIES if family not in STAGED]


def support(inputs: Tensor, cell: Tensor) -> list[tuple[int, int]]:
    """First and last row, first and last column of the inputs that reach a cell."""
    # A plain sum has no gradient behind a layer norm, so cells weigh differently.
    weights = torch.linspace(1, 2, cell.numel()).view_as(cell).square()
    (gradient,) = torch.autograd.grad((cell * weights).sum(), [inputs], retain_graph=True)
    reached = gradient.abs().amax(dim=(0, 1)) > 0
    found = []
    for axis in (1, 0):
        places = torch.nonzero(reached.any(dim=axis))[:, 0]
        found.append((int(places[0]), int(places[-1])))
    return found


def shaken(network: nn.Module) -> nn.Module:
    """Weights that let every pixel through, so that what reaches a cell can be seen in its gradient."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.01, 0.02)
        elif isinstance(module, nn.BatchNorm2d | FrozenBatchNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.fill_(0.1)
    return network


@pytest.mark.parametrize("family", STAGED)
@pytest.mark.parametrize("larger", [(0, 0), (8, 16)])
def test_entries_put_each_cell_over_the_middle_of_what_reaches_it(
    family: str, larger: tuple[int, int]
) -> None:
    model = tiny(family)
    seen: list[tuple[Any, ...]] = []
    hooks = [
        stage.entry.register_forward_hook(lambda module, given, out: seen.append((module, given, out)))
        for stage in stages_of(model).values()
    ]
    image = torch.randn(
        1, model.config.in_chans, *(a + b for a, b in zip(model.config.img_size, larger, strict=True))
    )
    model(image)
    for hook in hooks:
        hook.remove()
    for entry, (map, prefix), (_, _) in seen:
        inputs = map.detach().requires_grad_()
        out = entry(inputs, prefix)[0]
        before, after = tuple(map.shape[2:]), tuple(out.shape[2:])
        lines = axes(entry, before, after)
        for cell in [(side // 2, other // 2) for side, other in [after]]:
            boxes = support(inputs, out[:, :, cell[0], cell[1]])
            for axis, number, box, size in zip(lines, cell, boxes, before, strict=True):
                made_of = torch.nonzero(axis.matrix[number])[:, 0]
                assert (int(made_of[0]), int(made_of[-1])) == box
                given = float(axis.matrix[number].sum())
                assert given == pytest.approx(1) or (box[0] == 0 and 0.5 < given < 1)  # the rest is padding's
                if box[0] > 0 and box[1] < size - 1:
                    middle = (box[0] + box[1] + 1) / 2
                    assert axis.scale * (number + 0.5) + axis.shift == pytest.approx(middle, abs=0.51)


@pytest.mark.parametrize("family", PLAIN)
def test_residual_networks_put_each_cell_over_the_middle_of_what_reaches_it(family: str) -> None:
    model = shaken(tiny(family, img_size=(128, 128)))
    for module in model.modules():
        if "NonLocal" in type(module).__name__:
            module.forward = lambda map: map  # every place reaches every other through it
    image = torch.rand(1, 3, 128, 128).requires_grad_()
    name = last_map(model, image)
    kept: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: kept.append(out))
    with slid(model) as found:
        model(image)
    hook.remove()
    map = kept[0]
    placement = found[Grid(*map.shape[2:])]
    levels = model.levels[-1]
    assert (placement.scale_y, placement.scale_x) == (levels.stride, levels.stride)
    interior = list(range(map.shape[2]))
    checked = 0
    for row in interior:
        top, bottom = support(image, map[:, :, row, row])[0]
        if top > 0 and bottom < 127:
            assert placement.scale_y * (row + 0.5) + placement.shift_y == pytest.approx(
                (top + bottom + 1) / 2, abs=1
            )
            checked += 1
    assert checked or map.shape[2] < 3 or placement.scale_y >= 8


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("family", STAGED)
def test_a_bright_block_of_the_picture_is_found_at_its_own_place(family: str, orientation: int) -> None:
    """Through EXIF rotation, resizing, cropping and the cells of the first grid, and back."""
    model = tiny(family)
    name = next(name for name in registry.list_models() if model.name == name)
    preprocess = Preprocess(registry.default_card(name, model.config).preprocessing)
    height, width = 150, 220
    upright = Image.new("RGB", (width, height))
    upright.paste((255, 255, 255), (120, 60, 132, 72))
    turned = {
        1: None,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if turned[orientation] is None else upright.transpose(turned[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, format="PNG", exif=exif)
    picture = decode(buffer.getvalue())
    assert tuple(picture.shape[1:]) == (height, width)
    pixels = preprocess(picture)
    with explicit(model, only=()) as found, torch.no_grad():
        model(pixels[None].float() / 255)
    move = found.moves[0]
    values = move.rows.matrix @ pixels.float().mean(0) @ move.columns.matrix.t()
    heat = Heat(values=values[None], placement=found.first[1], units="brightness")
    geometry = preprocess.geometry(height, width)
    over = on_picture(heat, geometry)
    assert over.shape == (height, width)
    weight = over.nan_to_num(0.0) - over.nan_to_num(0.0).amax() / 2
    weight = weight.clamp_min(0)
    row = float((weight.sum(1) * (torch.arange(height) + 0.5)).sum() / weight.sum())
    column = float((weight.sum(0) * (torch.arange(width) + 0.5)).sum() / weight.sum())
    patch_y = found.first[1].scale_y * geometry.scale_y
    patch_x = found.first[1].scale_x * geometry.scale_x
    assert abs(row - 66) <= patch_y / 2 and abs(column - 126) <= patch_x / 2


def test_what_the_crop_left_out_has_no_value() -> None:
    heat = Heat(values=torch.ones(1, 2, 2), placement=Placement(16, 16), units="")
    preprocess = Preprocess(
        registry.default_card("vit_nano_patch4_32", registry.variant("vit_nano_patch4_32")).preprocessing
    )
    over = on_picture(heat, preprocess.geometry(64, 128))
    assert over[:, :32].isnan().all() and over[:, 96:].isnan().all()
    assert not over[:, 33:95].isnan().any()


def test_keys_of_windows_and_reductions_say_what_they_are_made_of() -> None:
    grid = Grid(5, 6)
    window = WindowAttention(8, 2, Grid(4, 4), RelativeTable(2, Grid(4, 4)))
    keys = keys_of(window, 64, grid, 0)
    assert keys is not None and tuple(keys.grid) == (8, 8)
    assert torch.equal(keys.rows.sum(1), torch.tensor([1.0] * 5 + [0.0] * 3))
    reduced = keys_of(SpatialReduction(8, 2, 2), 6, grid, 0)
    assert reduced is not None and tuple(reduced.grid) == (2, 3)
    assert torch.equal(reduced.rows[1], torch.tensor([0, 0, 0.5, 0.5, 0]))
    pooled = keys_of(SpatialReduction(8, 2, "pool"), 49, Grid(14, 14), 0)
    assert pooled is not None and torch.allclose(pooled.rows.sum(1), torch.ones(7))
    assert keys_of(nn.Identity(), 11, grid, 0) is None


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, 1), (7, 4, 2), (7, 4, 3), (3, 1, 1), (2, 2, 0), (5, 2, 2), (1, 2, 0)],
)
def test_an_even_map_stays_even_through_windows_that_overlap(kernel: int, stride: int, padding: int) -> None:
    """A mean over each window would draw a lattice, brighter where more windows meet."""
    size = 16 * stride
    shares = sliding(size, kernel, stride, padding).shares(size)
    assert (shares.sum(1) <= 1 + 1e-6).all()
    told = shares.sum(0) * min(kernel, stride)
    told = told[told > 0]  # steps that are longer than the window leave cells out
    assert torch.allclose(told[kernel : -2 * kernel], torch.ones(()))
    assert torch.allclose(told, torch.ones(()), atol=0.28)  # at the border no row hands out more than it has


def test_cells_between_whose_middles_a_place_lies_share_it() -> None:
    heat = Heat(values=torch.tensor([[[0.0, 4.0]]]), placement=Placement(8, 8), units="")
    assert heat.at(torch.tensor([4.0]), torch.tensor([4.0, 6.0, 8.0, 12.0]))[0, 0].tolist() == [0, 1, 2, 4]
    assert heat.at(torch.tensor([4.0]), torch.tensor([7.9, 8.1]), smooth=False)[0, 0].tolist() == [0, 4]
    assert Placement(1, 1, 0, 0) == PIXELS
    assert pictures(tiny("vit")).shape[0] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_holds_the_pixels_that_reach_its_cell_and_no_others(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A maximum has the gradient of one pixel alone.
    monkeypatch.setattr(nn.functional, "max_pool2d", nn.functional.avg_pool2d)
    model = tiny(family) if family in STAGED else shaken(tiny(family))
    pixels = torch.zeros(model.config.in_chans, *model.config.img_size, dtype=torch.uint8)
    preprocessing = registry.default_card(model.name, model.config).preprocessing
    story = trace(model, pixels, preprocessing, Classify(["a"] * model.num_classes))
    stages = stages_of(model)
    image = torch.rand(1, *pixels.shape).requires_grad_()
    if stages:
        map = next(iter(stages.values())).entry(image, None)[0]
    else:
        map = next(module for module in model.modules() if isinstance(module, Stem))(image)
    for row, column in ((0, 0), (map.shape[2] // 2, map.shape[3] // 2)):
        boxes = support(image, map[:, :, row, column])
        told = [(part.start, part.stop - 1) for part in story.window(row, column)]
        assert told == boxes


def test_the_hybrids_window_counts_every_convolution_of_the_stem() -> None:
    stem = BitStem(3, (2, 1))
    for name, module in list(stem.named_modules()):
        if isinstance(module, nn.GroupNorm):  # its statistics would let every pixel reach every cell
            setattr(stem.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Identity())
        elif isinstance(module, StandardConv):
            module.forward = lambda map, own=module: nn.functional.conv2d(
                pad_same(map, own.kernel_size[0], own.stride[0]), own.weight.abs(), stride=own.stride
            )
    image = torch.rand(1, 3, 128, 128).requires_grad_()
    map = stem(image, None)[0]
    rows = joined([pair[0] for pair in reaches(stem, (128, 128))])
    first, last = support(image, map[:, :, 8, 8])[0]
    assert (rows.after, rows.stride) == (map.shape[2], 8)
    assert (rows.first(8), rows.first(8) + rows.kernel - 1) == (first, last)


def test_the_outermost_cells_go_on_to_the_border() -> None:
    assert Placement(16, 8, -7.5, 0).edges(Grid(2, 2), (32, 16)) == ([0.0, 8.5, 32.0], [0.0, 8.0, 16.0])
