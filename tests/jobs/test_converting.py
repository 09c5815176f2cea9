"""Conversion of every family: a layout with a place for it, the sizes that a file tells, and nothing half done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import ProofError, WeightsError
from vitrail.jobs import convert as jobs
from vitrail.jobs.convert import convert
from vitrail.jobs.info import info
from vitrail.models import loading, registry
from vitrail.models.registry import create_model, from_pretrained
from vitrail.runs import ConvertRun, InfoRun
from vitrail.weights import adapter, files

T2T = {"depth": 1, "num_classes": 3}


def run(source: Path, target: Path, **options: Any) -> jobs.Converted:
    return convert(ConvertRun(source=str(source), target=str(target), **options))


def written(model: Any, layout: str) -> dict[str, Tensor]:
    """The model's tensors as a file of a layout holds them."""
    module = registry.family_of(model.name)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return adapter.write(
        state, adapter.by_name(module.RENAMES, layout), loading.context(module, model.config)
    )


def shrunk(name: str, **changes: Any) -> Any:
    """The variant under its name with the family's TINY sizes."""
    torch.manual_seed(0)
    module = registry.family_of(name)
    return registry.from_config(name, registry.changed(module.TINY, **changes))


def equal(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.fixture
def tiny_t2t(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A T2T-ViT of one block, and the variant in the registry for the time of a test."""
    module = registry.family_of("t2t_vit_7")
    monkeypatch.setitem(module.VARIANTS, "t2t_vit_7", registry.variant("t2t_vit_7", **T2T))
    torch.manual_seed(0)
    return create_model("t2t_vit_7")


def test_a_t2t_checkpoint_gives_its_averaged_weights_as_create_model_does(
    tiny_t2t: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = written(tiny_t2t, "original")
    state = {name: (tensor + 1).half() for name, tensor in averaged.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "t2t.pth.tar")
    run(tmp_path / "t2t.pth.tar", tmp_path / "out", model="t2t_vit_7")
    assert equal(from_pretrained(tmp_path / "out"), tiny_t2t)
    assert equal(create_model("t2t_vit_7", tmp_path / "t2t.pth.tar"), tiny_t2t)
    module = registry.family_of("t2t_vit_7")
    known = loading.context(module, tiny_t2t.config)
    only = adapter.Candidate("t2t_vit_7", module.RENAMES, lambda: loading.shapes(tiny_t2t), known)
    monkeypatch.setattr(loading, "candidates", lambda: [only])
    told = info(InfoRun(model=str(tmp_path / "t2t.pth.tar")))
    assert told.bytes == sum(tensor.nbytes for tensor in averaged.values())


@pytest.mark.parametrize(
    ("name", "changes", "layout"),
    [
        ("pvt_tiny", {"version": 1, "reductions": (4, 1)}, "original"),
        ("fcos_nano", {}, "own"),
        ("quick_detr_nano", {}, "own"),
        ("fpn_pvt_v2_nano", {}, "own"),
        ("trans2seg_nano", {"numerics": "clean"}, "original"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_a_folder_is_converted_into_the_layout_that_it_would_be_saved_in(
    name: str, changes: dict[str, Any], layout: str, half: bool, tmp_path: Path
) -> None:
    model = shrunk(name, **changes)
    model.save_pretrained(tmp_path / "in")
    assert model.card.layout == layout
    result = run(tmp_path / "in", tmp_path / "out", half=half)
    assert result.layout == layout
    again = from_pretrained(tmp_path / "out")
    assert again.config == model.config and equal(again, model.half().float() if half else model)


@pytest.mark.parametrize(
    ("name", "layout"), [("performer_nano_patch4_32", "transformers"), ("detr_nano", "transformers-modules")]
)
def test_a_folder_that_transformers_would_open_as_something_else_is_refused(
    name: str, layout: str, tmp_path: Path
) -> None:
    shrunk(name).save_pretrained(tmp_path / "in")
    with pytest.raises(WeightsError, match=f"no network whose folder holds {name} in the layout '{layout}'"):
        run(tmp_path / "in", tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "in", tmp_path / "out.safetensors", layout=layout)


def test_a_layout_without_a_place_names_those_that_have_one(tmp_path: Path) -> None:
    shrunk("pvt_v2_b0").save_pretrained(tmp_path / "in")
    with pytest.raises(
        WeightsError, match=r"no place for .* for every tensor: timm, original, transformers-v2\."
    ):
        run(tmp_path / "in", tmp_path / "out", layout="transformers")
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_network_unlike_the_published_one_is_written_in_our_names(tmp_path: Path) -> None:
    model = shrunk("trans2seg_nano", numerics="clean")
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(WeightsError, match=r"'original' holds weights of the released code.* Write a folder"):
        run(tmp_path / "in", tmp_path / "out.safetensors", layout="original")
    assert not (tmp_path / "out.safetensors").exists()
    assert run(tmp_path / "in", tmp_path / "out.safetensors").layout == "own"
    assert equal(create_model("trans2seg_nano", tmp_path / "out.safetensors", **vars(model.config)), model)


@pytest.mark.parametrize(
    ("name", "layout", "changes"),
    [("detr_resnet50", "original", {"num_classes": 2}), ("trans2seg_small", "original", {"num_classes": 3})],
)
def test_a_file_with_other_classes_keeps_them(
    name: str, layout: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.family_of(name)
    monkeypatch.setitem(module.VARIANTS, name, module.TINY)
    torch.manual_seed(0)
    model = create_model(name, **changes)
    files.write_tensors(tmp_path / "in.safetensors", written(model, layout))
    run(tmp_path / "in.safetensors", tmp_path / "out", model=name)
    again = from_pretrained(tmp_path / "out")
    assert again.num_classes == changes["num_classes"] and equal(again, model)


@pytest.mark.parametrize(
    ("name", "size"),
    [("pit_ti_224", (320, 320)), ("pit_ti_224", (96, 96)), ("vit_tiny_patch16_224", (96, 96))],
)
def test_a_file_of_another_size_tells_its_image_size(
    name: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.family_of(name)
    thin: dict[str, Any] = {"depths": (1, 1, 1)} if "pit" in name else {"depth": 1}
    monkeypatch.setitem(module.VARIANTS, name, registry.variant(name, num_classes=2, **thin))
    model = create_model(name, img_size=size)
    files.write_tensors(tmp_path / "in.safetensors", written(model, "timm"))
    run(tmp_path / "in.safetensors", tmp_path / "out", model=name)
    again = from_pretrained(tmp_path / "out")
    assert again.config.img_size == size == again.card.preprocessing.input_size


def test_a_layout_that_loses_something_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model("vit_nano_patch4_32", depth=1)
    model.save_pretrained(tmp_path / "in")
    whole = adapter.write

    def loses(state: Mapping[str, Tensor], *rest: Any) -> dict[str, Tensor]:
        return {name: tensor + (name == "head.bias") for name, tensor in whole(state, *rest).items()}

    monkeypatch.setattr(adapter, "write", loses)
    with pytest.raises(ProofError, match=r"head\.linear\.bias does not come back .* nothing was written"):
        run(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr(
        adapter, "write", lambda state, *rest: {**whole(state, *rest), "extra": torch.zeros(1)}
    )
    with pytest.raises(ProofError, match="cannot be read back, and nothing was written"):
        run(tmp_path / "in", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_what_the_disk_lost_is_removed(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model("vit_nano_patch4_32", depth=1).save_pretrained(tmp_path / "in")
    whole = files.read_tensors

    def torn(path: Any, **options: Any) -> dict[str, Tensor]:
        tensors = whole(path, **options)
        if Path(path).name == target:
            tensors["head.bias"] = tensors["head.bias"] + 1
        return tensors

    monkeypatch.setattr(files, "read_tensors", torn)
    with pytest.raises(ProofError, match=r"head\.bias read back is not what was written"):
        run(tmp_path / "in", tmp_path / target)
    assert not (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_averaged_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=2, init="timm")
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(WeightsError, match="holds no averaged weights beside others"):
        run(tmp_path / "in", tmp_path / "out", averaged=True)
    assert not (tmp_path / "out").exists()
    state = model.state_dict()
    torch.save(
        {"model": state, "model_ema": {name: 2 * value for name, value in state.items()}}, tmp_path / "c.pth"
    )
    run(tmp_path / "c.pth", tmp_path / "out", averaged=True, model="vit_tiny_patch16_224")
    weight = from_pretrained(tmp_path / "out").head.linear.weight
    assert torch.equal(weight, 2 * model.head.linear.weight)
