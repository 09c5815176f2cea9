"""How quick each engine is, beside its peers in the same run, in turns; and what each answer costs in agreement.

    python benchmarks/engines.py                        ViT-B/16, batch 8
    python benchmarks/engines.py --batch-size 1         latency, with transformers beside it
    python benchmarks/engines.py --table                one network of each family, batch 8
    python benchmarks/engines.py --cold                 a process from its start to its first prediction
    python benchmarks/engines.py --files FOLDER         from picture files to predictions
    python benchmarks/engines.py --products             what the chip gives in plain matrix products

Networks have random weights: speed does not depend on them. Peers are measured in the modes that people run them in
(`--peer-modes`): eager, and compiled with frozen weights, each in float32 and in bfloat16 where the chip has it.
The load of the machine is printed before and after. `--keep FOLDER` keeps prepared graphs, so that a second run
measures at once; `--rounds 0` only prepares.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vitrail
from vitrail.data.sample import photographs
from vitrail.data.transforms import Preprocess
from vitrail.engines.graph_cache import GraphCache
from vitrail.engines.onnx import OnnxEngine
from vitrail.engines.openvino import OpenVinoEngine
from vitrail.engines.pytorch import TorchEngine
from vitrail.export.manifest import Manifest
from vitrail.export.openvino import write_openvino
from vitrail.export.parity import prove
from vitrail.export.quantise import LADDER, quantise
from vitrail.runtime import has_bfloat16

TABLE = (
    "vit_base_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b2",
    "cait_xxs24_224",
    "t2t_vit_14",
    "pit_s_224",
    "seresnet50",
)
"""One network a family; timm's twin is measured where timm has one of this name."""

ENGINES = ("torch", "compiled", "onnxruntime", "openvino", "int8")

Call = Callable[[torch.Tensor], Any]


def engines_of(folder: Path, names: list[str], model: Any) -> dict[str, Any]:
    """The engines asked for, on one saved model, in every precision that the chip computes in."""
    precisions = ["fp32", *(["bf16"] if has_bfloat16(torch.device("cpu")) else [])]
    reference = TorchEngine(folder, device="cpu", precision="fp32")
    made: dict[str, Any] = {"torch fp32": reference}
    graph = GraphCache(folder).prepare(reference.network)
    for precision in precisions:
        if "torch" in names and precision != "fp32":
            made[f"torch {precision}"] = TorchEngine(folder, device="cpu", precision=precision)
        if "compiled" in names:
            made[f"compiled {precision}"] = TorchEngine(
                folder, device="cpu", precision=precision, compile=True
            )
        if "onnxruntime" in names and precision == "fp32":
            made["onnxruntime fp32"] = OnnxEngine(graph)
        if "openvino" in names:
            made[f"openvino {precision}"] = OpenVinoEngine(graph, precision=precision)
    if "int8" in names:
        place = graph.parent / "int8"
        if not place.is_dir():
            prepare = Preprocess(model.card.preprocessing)
            batches = [prepare(picture)[None].numpy() for picture in photographs(4)]
            quantised = quantise(graph, batches, LADDER[0])
            write_openvino(quantised, place, Manifest(card=model.card, precision="int8"))
        made["openvino int8"] = OpenVinoEngine(place)
    return made


def peers(name: str, size: tuple[int, int], modes: list[str], batch: int) -> dict[str, Call]:
    """timm's network of the same name in the modes asked for; for latency also transformers' ViT."""
    import timm

    found: dict[str, Call] = {}
    if not timm.is_model(name):
        return found
    precisions = ("fp32", "bf16") if has_bfloat16(torch.device("cpu")) else ("fp32",)
    network: Any = timm.create_model(name).eval()
    for mode in modes:
        for precision in precisions:
            subject = network
            if mode == "compiled":
                subject = torch.compile(network, dynamic=False, options={"freezing": True})
            found[f"timm {mode} {precision}"] = calling(subject, precision)
    if batch == 1 and name.startswith(("vit_", "deit_")):
        from vitrail.jobs.bench import _transformers_twin
        from vitrail.models import registry

        twin = _transformers_twin(name, registry.variant(name, img_size=size)).eval()
        for precision in precisions:
            found[f"transformers {precision}"] = calling(twin, precision)
    return found


def calling(network: Any, precision: str) -> Call:
    """A peer's network, called with uint8 images."""

    def call(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found: Any = network(images.float().sub_(127.5).div_(127.5))
            logits: torch.Tensor = getattr(found, "logits", found)
            return logits.float()

    return call


def measured(calls: dict[str, Call], images: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call(images)
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def row(name: str, given: argparse.Namespace, place: Path) -> None:
    """Measure one network and print its lines."""
    torch.manual_seed(0)
    model: Any = vitrail.create_model(name)
    head = model.get_classifier()
    if head.weight.abs().max() == 0:  # heads that start at zero would agree with anything
        torch.nn.init.normal_(head.weight, std=0.02)
    folder = place / name
    if not folder.is_dir():
        model.save_pretrained(folder)
    made = engines_of(folder, given.engines, model)
    prepare = Preprocess(model.card.preprocessing)
    images = torch.stack([prepare(picture) for picture in photographs(given.batch_size)])
    others = peers(name, model.config.img_size, given.peer_modes, given.batch_size)
    times = measured({**others, **made}, images, given.rounds)
    if not given.rounds:
        return
    base = min(times["timm eager fp32"] if "timm eager fp32" in times else times["torch fp32"])
    for engine, kept in times.items():
        best, middle = given.batch_size / min(kept), given.batch_size / statistics.median(kept)
        known = agreement(made, engine, images)
        print(f"{name:29} {engine:19} {best:8.2f} {middle:8.2f} {base / min(kept):6.2f} x  {known}")
    sys.stdout.flush()


def agreement(made: dict[str, Any], engine: str, images: torch.Tensor) -> str:
    """How an engine's answers stand to torch's, on photographs."""
    if engine not in made or engine == "torch fp32":
        return ""
    proof = prove(
        lambda part: made["torch fp32"](torch.stack(list(part))),
        lambda part: made[engine](torch.stack(list(part))),
        [(list(images), None)],
        precision=made[engine].precision,
        pictures="photographs",
    )
    return f"logits {proof.logits_max:.0e}"


COLD = """
import sys, time
started = time.perf_counter()
from vitrail import Predictor
predictor = Predictor(sys.argv[1], engine=sys.argv[2], precision=sys.argv[4])
predictor([sys.argv[3]])
print(predictor.engine.name, predictor.engine.precision, f"{time.perf_counter() - started:.2f}")
"""


def cold(name: str, rounds: int) -> None:
    """From the start of a process to its first prediction, the graph being prepared already."""
    from PIL import Image

    kinds = [("torch", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32")]
    if has_bfloat16(torch.device("cpu")):
        kinds += [("torch", "bf16"), ("openvino", "bf16")]
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as bytecode:
        # Compiled Python is kept after the first start, as on any machine that does not forbid it.
        unbound = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        unbound["PYTHONPYCACHEPREFIX"] = bytecode
        vitrail.create_model(name).save_pretrained(place)
        picture = Path(place) / "picture.png"
        Image.fromarray(photographs(1)[0].permute(1, 2, 0).numpy()).save(picture)
        for engine, precision in kinds:
            whole = []
            for _ in range(rounds + 1):  # the first one prepares
                started = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", COLD, place, engine, str(picture), precision],
                    capture_output=True, text=True, check=True, env=unbound,
                )  # fmt: skip
                whole.append(time.perf_counter() - started)
            print(
                f"{name} cold, {done.stdout.strip()} s inside the last; whole process best {min(whole[1:]):.2f} s,"
                f" median {statistics.median(whole[1:]):.2f} s; the first, which prepares, {whole[0]:.1f} s",
                flush=True,
            )


def files(name: str, pictures: str, batch: int, rounds: int) -> None:
    """From picture files to predictions, per core: our Predictor by engine, timm and transformers as their
    documentation has them (float32, pictures read by Pillow one after the other)."""
    from vitrail.predict import expand

    with tempfile.TemporaryDirectory() as place:
        if pictures.endswith(".zip"):
            with zipfile.ZipFile(pictures) as archive:
                archive.extractall(Path(place) / "pictures")
            pictures = str(Path(place) / "pictures")
        paths = expand([pictures])
        model: Any = vitrail.create_model(name)
        model.save_pretrained(Path(place) / "model")
        made: dict[str, Callable[[], Any]] = {"timm": timm_files(name, paths, batch)}
        if name.startswith(("vit_", "deit_")):
            made["transformers pipeline"] = transformers_files(model, paths, batch, Path(place) / "peer")
        kinds = ["auto", "fp32"] if has_bfloat16(torch.device("cpu")) else ["fp32"]
        for engine in ("torch", "onnxruntime", "openvino"):
            for precision in kinds if engine != "onnxruntime" else ["fp32"]:
                predictor = vitrail.Predictor(
                    Path(place) / "model", engine=engine, precision=precision, batch_size=batch
                )
                label = f"vitrail {predictor.engine.name} {predictor.engine.precision}"
                made[label] = functools.partial(predictor, paths)
        times: dict[str, list[float]] = {label: [] for label in made}
        for turn in range(rounds + 1):
            for label, call in made.items():
                started = time.perf_counter()
                call()
                if turn:
                    times[label].append(time.perf_counter() - started)
        cores = torch.get_num_threads()
        print(f"{name}, {len(paths)} files, batch {batch}; images/s and core: best, median")
        for label, kept in times.items():
            best, middle = (len(paths) / value / cores for value in (min(kept), statistics.median(kept)))
            against = "".join(
                f"  {min(times[peer]) / min(kept):5.2f} x {peer.split()[0]}"
                for peer in ("timm", "transformers pipeline")
                if peer in times
            )
            print(f"  {label:28} {best:8.2f} {middle:8.2f}{against}", flush=True)


def timm_files(name: str, paths: list[str], batch: int) -> Callable[[], Any]:
    """timm's network with timm's own transform, picture by picture, in batches."""
    import timm
    from PIL import Image

    network = timm.create_model(name).eval()
    data: Any = timm.data
    transform: Any = data.create_transform(**data.resolve_model_data_config(network), is_training=False)

    def run() -> None:
        with torch.inference_mode():
            for first in range(0, len(paths), batch):
                part = [transform(Image.open(path).convert("RGB")) for path in paths[first : first + batch]]
                network(torch.stack(part)).softmax(dim=1).topk(5)

    return run


def transformers_files(model: Any, paths: list[str], batch: int, place: Path) -> Callable[[], Any]:
    """transformers' pipeline for image classification on a network of the same shape."""
    from transformers import ViTImageProcessor, pipeline

    from vitrail.jobs.bench import _transformers_twin

    twin: Any = _transformers_twin(model.name, model.config)
    make: Any = ViTImageProcessor
    rows, columns = model.config.img_size
    classify: Any = pipeline(
        "image-classification",
        model=twin.eval(),
        image_processor=make(size={"height": rows, "width": columns}),
        batch_size=batch,
        device="cpu",
    )
    return lambda: classify(paths, top_k=5)


def products() -> None:
    """Matrix products of ViT-B/16's first MLP layer at batch 8: the ceiling of any engine here."""
    rows, inner, columns = 1576, 768, 3072
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    whole = [torch.randint(-8, 8, shape, dtype=torch.int8) for shape in ((rows, inner), (inner, columns))]
    calls: dict[str, Callable[[], Any]] = {"fp32": lambda: left @ right}
    if has_bfloat16(torch.device("cpu")):
        half = left.bfloat16(), right.bfloat16()
        calls["bf16"] = lambda: half[0] @ half[1]
        calls["int8"] = lambda: torch._int_mm(whole[0], whole[1])
    times: dict[str, list[float]] = {label: [] for label in calls}
    for turn in range(30):
        for label, call in calls.items():
            started = time.perf_counter()
            call()
            if turn > 2:
                times[label].append(time.perf_counter() - started)
    work = 2 * rows * inner * columns / 1e9
    for label, kept in times.items():
        print(
            f"{rows} x {inner} x {columns} in {label}: {work / min(kept):.0f} billion operations/s, best of 27"
        )


def machine() -> str:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.is_file() else ""
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in text]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {' '.join(wanted)}; torch {torch.__version__},"
        f" {torch.get_num_threads()} threads; load {load}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224"])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--files", metavar="FOLDER_OR_ZIP")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--peer-modes", nargs="*", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", metavar="FOLDER")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    if given.cold:
        cold("vit_small_patch16_224", given.rounds)
    elif given.products:
        products()
    elif given.files:
        files(given.models[0], given.files, given.batch_size, given.rounds)
    else:
        print(f"{'network':29} {'engine':19} {'best/s':>8} {'median':>8} {'':>8}  batch {given.batch_size}")
        with contextlib.ExitStack() as stack:
            place = given.keep or stack.enter_context(tempfile.TemporaryDirectory())
            for name in TABLE if given.table else given.models:
                row(name, given, Path(place))
    print(machine())


if __name__ == "__main__":
    main()
