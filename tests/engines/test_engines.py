"""Which engine computes, what is kept between runs, and what happens where one is missing or broken."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from export.worlds import colour_model, untyped

from vitrail.engines import choose, faster_engine, open_engine
from vitrail.engines.graph_cache import FOLDER, GRAPH, GraphCache
from vitrail.engines.pytorch import TorchEngine, fill
from vitrail.errors import ConfigError, WeightsError
from vitrail.export import openvino
from vitrail.export.manifest import KEY
from vitrail.export.onnx import read_manifest
from vitrail.predict import Predictor

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a prepared graph beside it."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = colour_model(tmp_path_factory.mktemp("ready") / "model")
    with untyped():
        assert open_engine(folder, "onnxruntime").name == "onnxruntime"
    return folder


@pytest.fixture
def model(ready: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(ready, tmp_path / "model"))


def same(engine: Any, model: Path) -> bool:
    wanted = TorchEngine(model, precision="fp32")(IMAGES)
    return bool((engine(IMAGES) - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def test_auto_prepares_nothing_for_a_few_pictures(tmp_path: Path) -> None:
    model = colour_model(tmp_path / "model")
    engine = open_engine(model)
    assert engine.name == "torch"
    assert faster_engine(engine, str(model), "auto", images=3, batch_size=3) is engine
    assert not (model / FOLDER).exists()


def test_a_prepared_graph_is_used_again_and_needs_no_network(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the network was built")

    wanted = TorchEngine(model, precision="fp32")(IMAGES)
    monkeypatch.setattr("vitrail.engines.graph_cache.from_pretrained", never)
    engine = open_engine(model, "onnxruntime")
    assert engine.name == "onnxruntime" and torch.allclose(engine(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_auto_measures_once_when_there_is_much_to_do_and_remembers(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(choose, "installed", lambda: ["onnxruntime"])
    monkeypatch.setattr(choose, "speeds", lambda engines, images: {"torch": 1.0, "onnxruntime": 2.0})
    caplog.set_level(logging.INFO, "vitrail")
    engine = faster_engine(open_engine(model), str(model), "auto", images=1000, batch_size=4)
    assert engine.name == "onnxruntime" and same(engine, model)
    assert "engine onnxruntime, fp32: 2.0 images/s here at batch 4 (torch 1.0); logits agree" in caplog.text
    assert open_engine(model).name == "onnxruntime"  # without measuring again
    assert open_engine(model, "torch").name == "torch"


def test_what_was_measured_for_a_model_that_ships_is_remembered_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("vitrail.engines.graph_cache.shipped.ASSETS", tmp_path)
    monkeypatch.setattr(choose, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(choose, "installed", lambda: ["onnxruntime"])
    monkeypatch.setattr(choose, "speeds", lambda engines, images: {"torch": 1.0, "onnxruntime": 2.0})
    model = colour_model(tmp_path / "model")
    with untyped():
        faster_engine(open_engine(model), str(model), "auto", images=1000, batch_size=4)
    assert not (model / FOLDER).exists()
    assert open_engine(model).name == "onnxruntime"


def test_auto_stays_with_torch_where_it_is_as_quick(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(choose, "installed", lambda: ["onnxruntime"])
    monkeypatch.setattr(choose, "speeds", lambda engines, images: {"torch": 1.0, "onnxruntime": 1.01})
    assert faster_engine(open_engine(model), str(model), "auto", images=1000, batch_size=4).name == "torch"
    assert open_engine(model).name == "torch"


def test_an_engine_that_strays_is_left_out(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = choose.open_prepared

    def crooked(*given: Any) -> Any:
        engine = real(*given)

        class Crooked:
            precision, card = engine.precision, engine.card

            def __call__(self, images: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = engine(images) + 0.1
                return found

        return Crooked()

    monkeypatch.setattr(choose, "installed", lambda: ["onnxruntime"])
    monkeypatch.setattr(choose, "open_prepared", crooked)
    torch_engine = TorchEngine(model, precision="fp32")
    graphs = GraphCache(model)
    assert choose.measure(graphs, torch_engine.network, torch_engine, "fp32", 4) is torch_engine
    assert "onnxruntime is left out: logits differ" in caplog.text


def test_a_missing_engine_falls_back_to_torch_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*packages: str, extra: str) -> None:
        raise ConfigError(f"{packages[0]} is not installed")

    monkeypatch.setattr("vitrail.engines.onnx.require", missing)
    engine = open_engine(model, "onnxruntime", precision="fp32")
    assert engine.name == "torch" and same(engine, model)
    assert "onnxruntime is not installed); torch does the work" in caplog.text


def test_a_broken_graph_falls_back_to_torch(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = GraphCache(model).graph()
    assert graph is not None
    graph.write_bytes(b"not a graph")
    assert open_engine(model, "onnxruntime").name == "torch"
    assert "torch does the work" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_model_that_has_changed_gets_a_new_graph(model: Path) -> None:
    old = GraphCache(model)
    changed = TorchEngine(model).network
    with torch.no_grad():
        changed.head.linear.bias.add_(1)
    changed.save_pretrained(model)
    new = GraphCache(model)
    assert new.key != old.key and new.graph() is None
    assert same(open_engine(model, "onnxruntime"), model)
    assert [path.name for path in (model / FOLDER).iterdir()] == [new.key]
    assert (model / FOLDER / new.key / GRAPH).is_file()


def test_weights_that_are_not_the_cards_never_reach_an_engine(model: Path) -> None:
    weights = model / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(WeightsError, match="changed or damaged"):
        open_engine(model, "onnxruntime")


def test_a_predictor_takes_an_engine_by_name(model: Path) -> None:
    predictor = Predictor(model, engine="onnxruntime")
    assert predictor.engine.name == "onnxruntime"
    assert predictor.forward(IMAGES).shape == (3, 3)
    assert [
        len(record.top) for record in predictor([image.permute(1, 2, 0).numpy() for image in IMAGES])
    ] == [3] * 3


def test_an_engine_that_was_asked_for_is_held_against_torch_once(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vitrail")
    open_engine(model, "onnxruntime")
    assert "engine onnxruntime, fp32: as chosen; logits agree with torch to" in caplog.text
    graphs = GraphCache(model)
    graphs.record({key: {**row, "failures": ["moved"]} for key, row in graphs.measurements().items()})
    assert open_engine(model, "onnxruntime").name == "torch"
    assert "strays from torch: moved" in caplog.text


def test_an_unknown_engine_is_refused_with_near_names(model: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean openvino"):
        open_engine(model, "openvine")


def test_a_graph_is_prepared_beside_an_int8_one(model: Path) -> None:
    graphs = GraphCache(model)
    (graphs.folder() / GRAPH).unlink()
    (graphs.folder() / "int8").mkdir()
    with untyped():
        assert open_engine(model, "onnxruntime").name == "onnxruntime"
    assert (graphs.folder() / "int8").is_dir() and graphs.graph() is not None


def test_openvino_computes_in_several_threads_at_once_on_a_share_of_the_cores(
    model: Path,
) -> None:
    pytest.importorskip("openvino")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = open_engine(model, "openvino", precision="fp32")
        assert engine.name == "openvino" and same(engine, model)
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as lanes:
            assert all(lanes.map(lambda _: same(engine, model), range(40)))
    finally:
        torch.set_num_threads(before)


def test_int8_without_a_graph_says_how_to_make_one(model: Path) -> None:
    with pytest.raises(ConfigError, match="vitrail export"):
        open_engine(model, precision="int8")


@pytest.mark.parametrize(("count", "filled"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_batches_are_filled_up_to_a_few_sizes(count: int, filled: int) -> None:
    batch = torch.randn(count, 3, 2, 2)
    found = fill(batch)
    assert len(found) == filled and torch.equal(found[:count], batch)


@pytest.mark.usefixtures("unchecked")
def test_compiling_that_fails_falls_back_to_the_plain_network(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(network: Any, **_: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    engine = TorchEngine(model, precision="fp32", compile=True)
    assert same(engine, model) and engine.name == "torch"
    assert "no compiler here" in caplog.text


@pytest.mark.parametrize(
    ("gap", "moved", "passes"),
    [(0.005, 0.01, True), (0.11, 0.12, False), (0.9, 0.06, False)],
    ids=["a tie that rounding decides", "another class", "logits far away"],
)
def test_in_bf16_an_engine_may_differ_within_rounding(
    model: Path, gap: float, moved: float, passes: bool
) -> None:
    class Fixed:
        precision = "bf16"

        def __init__(self, second: float) -> None:
            self.second = second

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, self.second, 0.0]).repeat(len(images), 1)

    found = choose.check(Fixed(1 - gap), Fixed(1 - gap + moved), GraphCache(model))
    assert found.passed is passes, found.failures


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98], ids=["empty", "cut in the middle", "without its end"])
def test_a_damaged_onnx_file_is_told_as_such(ready: Path, tmp_path: Path, engine: str, kept: float) -> None:
    pytest.importorskip(engine)
    graph, cut = GraphCache(ready).graph(), tmp_path / "cut.onnx"
    assert graph is not None
    whole = graph.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(WeightsError, match=r"cut\.onnx"):
        open_engine(cut, engine)


@pytest.mark.parametrize("what", ["no weights", "cut weights", "cut graph", "empty graph"])
def test_a_damaged_openvino_folder_is_told_as_such(ready: Path, tmp_path: Path, what: str) -> None:
    pytest.importorskip("openvino")
    graph = GraphCache(ready).graph()
    assert graph is not None
    openvino.write_openvino(openvino.from_onnx(graph), tmp_path / "damaged", read_manifest(graph))
    xml, weights = (tmp_path / "damaged" / name for name in openvino.FILES)
    assert open_engine(tmp_path / "damaged").classes == 3
    if what == "no weights":
        weights.unlink()
    else:
        file = weights if what == "cut weights" else xml
        file.write_bytes(file.read_bytes()[: 0 if what == "empty graph" else file.stat().st_size // 2])
    for opened in (open_engine, openvino.read_manifest):
        with pytest.raises(WeightsError, match=r"damaged cannot be opened .* Export it again"):
            opened(tmp_path / "damaged")


def card_of(graph: Path, change: Callable[[Any], Any]) -> str:
    return json.dumps(change(json.loads(read_manifest(graph).to_text())))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda view: {**view, "card": [1]}, "card that cannot be read"),
        (lambda view: [], "card that cannot be read"),
        (lambda view: {**view, "rows": 8}, "card that cannot be read"),
        (lambda view: {**view, "rows": {"step": 0}}, "card that cannot be read"),
        (lambda view: {**view, "card": {**view["card"], "label_names": ["a", "b"]}}, "2 class names for 3 classes"),
        (lambda view: {**view, "card": other_classes(view["card"])}, "gives 3 logits and its card tells 2 classes"),
    ],
    ids=["a list for a card", "a list for all", "a number for sizes", "no step", "fewer names", "another model's card"],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_card_that_is_none_or_another_models_is_told_as_such(
    ready: Path, tmp_path: Path, engine: str, change: Any, told: str
) -> None:
    pytest.importorskip(engine)
    graph = GraphCache(ready).graph()
    assert graph is not None
    with pytest.raises(WeightsError, match=told):
        open_engine(with_text(graph, tmp_path / "m.onnx", card_of(graph, change)), engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_file_without_a_card_is_told_as_such(ready: Path, tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    graph = GraphCache(ready).graph()
    assert graph is not None
    with pytest.raises(WeightsError, match=r"carries no vitrail card.*vitrail export"):
        open_engine(with_text(graph, tmp_path / "m.onnx", ""), engine)


def other_classes(card: Any) -> Any:
    own = {**card["vitrail"], "config": {**card["vitrail"]["config"], "num_classes": 2}}
    return {**card, "label_names": ["a", "b"], "vitrail": own}


def with_text(graph: Path, path: Path, text: str) -> Path:
    """A copy of a graph with another text for a card; without one where it is empty."""
    onnx: Any = pytest.importorskip("onnx")
    model = onnx.load(str(graph))
    del model.metadata_props[:]
    if text:
        model.metadata_props.add(key=KEY, value=text)
    onnx.save(model, str(path))
    return path
