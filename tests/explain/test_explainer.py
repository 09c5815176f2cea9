from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from tests.explain.families import tiny
from vitrail.cli.main import main
from vitrail.errors import ConfigError
from vitrail.explain.explainer import Explainer
from vitrail.explain.explorer_page import explorer

LABELS = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny("vit")
    model.card = dataclasses.replace(model.card, labels=LABELS)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_one_call_gives_a_map_over_the_picture(folder: Path, photo: Path) -> None:
    found = vitrail.explain(folder, photo, target="cat", score=True)
    assert (found.method, found.label, found.target, found.class_specific) == ("relevance", "cat", 2, True)
    assert found.overlay().shape == (200, 300, 3)
    assert found.values.shape == (4, 4) and found.values.dtype == np.float32
    assert set(found.faithfulness) == {"mean", "blur", "removal"}
    assert set(found.controls["mean"]) == {"random", "centre"}
    record = json.loads(json.dumps(found.to_dict()))
    assert record["label"] == "cat" and record["predicted"] in LABELS
    # The middle of the grid is the picture's, but for the pixel that no crop of 3 can halve.
    cell = record["cell"]
    y, x = cell["scale_y"] * 2 + cell["shift_y"], cell["scale_x"] * 2 + cell["shift_x"]
    assert (y, x) == pytest.approx((100, 150), abs=0.51 * cell["scale_y"] / 8)


def test_it_may_be_called_under_inference_mode(folder: Path, photo: Path) -> None:
    wanted = vitrail.explain(folder, photo, method="relevance").values
    network = tiny("resnet")
    with torch.inference_mode():
        assert np.array_equal(vitrail.explain(folder, photo, method="relevance").values, wanted)
        assert vitrail.explain(network, photo, method="gradcam").heat.values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_kind_are_told_before_torch_stumbles(dtype: torch.dtype, photo: Path) -> None:
    network = tiny("vit").to(dtype)
    with pytest.raises(ConfigError, match=f"weights are {str(dtype)[6:]}, .* call .float"):
        vitrail.explain(network, photo)
    assert next(network.parameters()).dtype == dtype
    assert vitrail.explain(network.float(), photo).method == "relevance"


def test_a_class_may_be_any_whole_number_and_a_name_must_be_of_one_class(folder: Path, photo: Path) -> None:
    explainer = Explainer(folder)
    for number in (2, np.int64(2), torch.tensor(2), "2", "cat"):
        assert explainer.class_number(number) == 2  # type: ignore[arg-type]
    for wrong in (2.0, -1, 5, "-1"):
        with pytest.raises(ConfigError, match="is no class of this model"):
            explainer.class_number(wrong)  # type: ignore[arg-type]
    explainer.labels = ("crane", "bee", "crane", "dog", "elk")
    with pytest.raises(ConfigError, match="'crane' is the name of 2 classes, 0, 2: give the number"):
        explainer(photo, "crane")
    assert explainer(photo, 2).target == 2


def test_what_it_is_called_with_may_be_anything_a_picture_can_be(folder: Path, photo: Path) -> None:
    explainer = Explainer(folder)
    image = Image.open(photo).convert("RGB")
    array = np.asarray(image)
    maps = [
        explainer(given, 1, "rollout").values
        for given in (
            photo,
            photo.read_bytes(),
            image,
            array,
            torch.from_numpy(array.copy()).permute(2, 0, 1),
        )
    ]
    assert all(np.array_equal(maps[0], other) for other in maps)


def test_rollout_says_that_it_does_not_know_classes(folder: Path, photo: Path) -> None:
    found = Explainer(folder)(photo, "bee", "rollout")
    assert not found.class_specific
    assert "does not know classes" in found.caution
    assert np.array_equal(found.values, Explainer(folder)(photo, "dog", "rollout").values)


def test_a_map_that_is_the_same_everywhere_says_so(folder: Path, photo: Path) -> None:
    explainer = Explainer(folder)
    torch.nn.init.zeros_(explainer.network.head.linear.weight)
    assert "the same everywhere" in explainer(photo, method="relevance").caution


def test_an_unknown_class_is_answered_with_those_near(folder: Path, photo: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean cat"):
        vitrail.explain(folder, photo, target="cta")
    with pytest.raises(ConfigError, match=r"'9' is no class.*It knows .*cat.*by number 0 to"):
        vitrail.explain(folder, photo, target="9")


@pytest.mark.parametrize("family", ["vit", "deit", "cait", "pvt", "swin", "t2t", "nonlocal"])
def test_the_page_holds_every_layer_and_asks_for_nothing(family: str, photo: Path) -> None:
    import base64
    import re

    explainer = Explainer(tiny(family))
    found = explainer(photo)
    text = explorer(explainer, [found])
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert len(data["layers"]) == sum(hasattr(part, "mix") for part in explainer.network.modules())
    for layer in data["layers"]:
        size = layer["heads"] * layer["queries"] * layer["keys"]
        values = np.frombuffer(base64.b64decode(layer["data"]), np.uint8)
        assert len(values) == size
        if family != "nonlocal":
            rows = ((values / 255.0) ** 2 * layer["most"]).reshape(-1, layer["keys"]).sum(1)
            assert np.all(rows < 1.05)
            if family != "swin":  # its padding takes a share
                assert np.allclose(rows, 1, atol=0.05)


def test_the_command_writes_maps_records_and_the_page(
    folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--class", "bee", "--method", "relevance", "rollout", "--score", "--output", str(out)]
    assert main(["explain", str(folder), str(photo), *flags]) == 0
    assert {path.name for path in out.iterdir()} == {
        "relevance.png", "relevance.npy", "rollout.png", "rollout.npy", "explanation.json", "explain.html",
    }  # fmt: skip
    assert np.load(out / "relevance.npy").shape == (4, 4)
    with Image.open(out / "relevance.png") as drawn:
        assert drawn.size == (300, 200)
    told = capsys.readouterr()
    assert "scoring costs about 552 forward passes" in told.err
    assert "relevance" in told.out and "bee" in told.out
    assert main(["explain", str(folder), str(photo), "--method", "nothing"]) == 2
    assert "method must be one of" in capsys.readouterr().err


def test_the_command_puts_methods_on_trial_over_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("vit")
    model.save_pretrained(tmp_path / "model")
    arguments = [
        "--score",
        "--samples",
        "4",
        "--method",
        "rollout",
        "gradcam",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["explain", str(tmp_path / "model"), "digits", *arguments]) == 0
    record = json.loads((tmp_path / "out" / "faithfulness.json").read_text())
    assert record["images"] == 4
    assert {row["method"] for row in record["tables"]["blur"]} == {"rollout", "gradcam", "random", "centre"}
    assert set(record["cost_in_forwards"]) == {"rollout", "gradcam"}
    assert "the trial costs about" in capsys.readouterr().err
    table = (tmp_path / "out" / "faithfulness.md").read_text().splitlines()
    assert len(table) == 2 + 3 * 4  # three fills; two methods, two controls
    assert {line.count("|") for line in table} == {8}
    assert sum("knows no class" in line for line in table) == 1  # rollout
    assert sum("| control |" in line for line in table) == 2


def test_inspect_draws_what_there_is(
    folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder), str(photo), "--output", str(tmp_path / "figures")]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"filters.png", "positions.png", "distance.png", "heads.png", "norms.png", "inspect.json"}
    record = json.loads((tmp_path / "figures" / "inspect.json").read_text())
    assert len(record["heads"]) == 4 and record["pictures"] == 1
    assert "attention sinks" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--output", str(tmp_path / "bare")]) == 0
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {
        "filters.png",
        "positions.png",
        "inspect.json",
    }


def test_a_picture_that_cannot_be_read_does_not_end_the_others(
    folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(photo.read_bytes()[:200])
    told = ["explain", str(folder), str(torn), str(photo), str(tmp_path / "none.png"), "--no-page"]
    assert main([*told, "-o", str(tmp_path / "out"), "--format", "json"]) == 1
    printed = capsys.readouterr()
    records = json.loads(printed.out)
    assert [record["error"] is None for record in records] == [False, True, False]
    assert records[0]["source"] == str(torn) and "torn.png" in records[0]["error"]
    assert records[0]["explanations"] == records[0]["files"] == []
    assert all(Path(path).exists() for path in records[1]["files"])
    assert records[1]["explanations"][0]["precision"] == "fp32"
    assert "2 of 3 pictures could not be explained" in printed.err
    assert "Computed in float32: `vitrail predict --precision fp32`" in printed.err
    assert main([*told, "-o", str(tmp_path / "again")]) == 1
    assert "error: " in capsys.readouterr().out


def test_what_is_explained_is_what_predict_says_in_float32(
    folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(folder), str(photo), "--precision", "fp32", "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)[0]
    assert (
        main(["explain", str(folder), str(photo), "-o", str(tmp_path), "--format", "json", "--no-page"]) == 0
    )
    (found,) = json.loads(capsys.readouterr().out)[0]["explanations"]
    assert main(["trace", str(folder), str(photo), "-o", str(tmp_path), "--format", "json"]) == 0
    printed = capsys.readouterr()
    followed = json.loads(printed.out)
    assert (found["label"], followed["label"]) == (said["label"], said["label"])
    assert found["score"] == pytest.approx(said["score"], abs=1e-6)
    assert followed["score"] == pytest.approx(said["score"], abs=1e-6)
    assert followed["precision"] == "fp32" and "float32" in printed.err
