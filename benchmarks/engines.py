"""How quick each engine is, beside timm in the same run, in turns; and what each answer costs in agreement.

    python benchmarks/engines.py                        ViT-B/16, batch 8
    python benchmarks/engines.py --table                one network of each family, batch 8
    python benchmarks/engines.py --cold                 a process from its start to its first prediction
    python benchmarks/engines.py --files FOLDER         from picture files to predictions

Networks have random weights: speed does not depend on them. Say the load of the machine beside the numbers:
it is printed before and after.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vitrail
from vitrail.data.sample import photographs
from vitrail.data.transforms import Preprocess
from vitrail.engines.onnx import OnnxEngine
from vitrail.engines.openvino import OpenVinoEngine
from vitrail.engines.prepare import Shelf
from vitrail.engines.pytorch import TorchEngine
from vitrail.export.openvino import write_openvino
from vitrail.export.parity import prove
from vitrail.export.quantise import LADDER, quantise
from vitrail.runtime import has_bfloat16

TABLE = (
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b2",
    "cait_xxs24_224",
    "t2t_vit_14",
    "pit_s_224",
    "seresnet50",
)
"""One network a family; timm's twin is measured where timm has one of this name."""

Call = Callable[[torch.Tensor], Any]


def engines_of(folder: Path, names: list[str], model: Any) -> dict[str, Any]:
    """The engines asked for, on one saved model."""
    torch_engine = TorchEngine(folder, device="cpu", precision="fp32")
    made: dict[str, Any] = {"vitrail torch": torch_engine}
    graph = Shelf(folder).prepare(torch_engine.network)
    if "onnxruntime" in names:
        made["onnxruntime"] = OnnxEngine(graph)
    if "openvino" in names:
        made["openvino"] = OpenVinoEngine(graph)
        if has_bfloat16(torch.device("cpu")):
            made["openvino bf16"] = OpenVinoEngine(graph, precision="bf16")
    if "int8" in names:
        prepare = Preprocess(model.card.preprocessing)
        batches = [prepare(picture)[None].numpy() for picture in photographs(16)]
        quantised = quantise(graph, batches, LADDER[0])
        from vitrail.export.label import Label

        write_openvino(quantised, folder / "int8", Label(card=model.card, precision="int8"))
        made["openvino int8"] = OpenVinoEngine(folder / "int8")
    return made


def timm_twin(name: str, size: tuple[int, int]) -> Call | None:
    """timm's network of the same name, called with normalised images; None where there is none."""
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    network = timm.create_model(name).eval()

    def call(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = network(images.float().sub_(127.5).div_(127.5))
            return found

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


def row(name: str, batch: int, rounds: int, names: list[str]) -> None:
    """Measure one network and print its lines."""
    torch.manual_seed(0)
    model: Any = vitrail.create_model(name)
    head = model.get_classifier()
    if head.weight.abs().max() == 0:  # heads that start at zero would agree with anything
        torch.nn.init.normal_(head.weight, std=0.02)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        made = engines_of(Path(place), names, model)
        prepare = Preprocess(model.card.preprocessing)
        pictures = photographs(batch)
        images = torch.stack([prepare(picture) for picture in pictures])
        twin = timm_twin(name, model.config.img_size)
        calls: dict[str, Call] = {**({"timm": twin} if twin else {}), **made}
        times = measured(calls, images, rounds)
        base = "timm" if twin else "vitrail torch"
        for engine, kept in times.items():
            best, middle = batch / min(kept), batch / statistics.median(kept)
            against = min(times[base]) / min(kept)
            print(
                f"{name:30} {engine:16} {best:8.2f} {middle:8.2f} {against:6.2f} x  {agreement(made, engine, images)}"
            )
        sys.stdout.flush()


def agreement(made: dict[str, Any], engine: str, images: torch.Tensor) -> str:
    """How an engine's answers stand to torch's, on photographs."""
    if engine not in made or engine == "vitrail torch":
        return ""
    proof = prove(
        lambda part: made["vitrail torch"](torch.stack(list(part))),
        lambda part: made[engine](torch.stack(list(part))),
        [(list(images), None)],
        precision=made[engine].precision,
        pictures="photographs",
    )
    return f"same class {100 * proof.agreement:.0f} %, logits {proof.logits_max:.0e}"


COLD = """
import sys, time
started = time.perf_counter()
from vitrail import Predictor
predictor = Predictor(sys.argv[1], engine=sys.argv[2])
predictor([sys.argv[3]])
print(predictor.engine.name, f"{time.perf_counter() - started:.2f}")
"""


def cold(name: str) -> None:
    """From the start of a process to its first prediction, the graph being prepared already."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as place:
        vitrail.create_model(name).save_pretrained(place)
        picture = Path(place) / "picture.png"
        Image.fromarray(photographs(1)[0].permute(1, 2, 0).numpy()).save(picture)
        for engine in ("torch", "onnxruntime", "openvino"):
            for _ in range(4):  # the first one prepares
                started = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", COLD, place, engine, str(picture)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                whole = time.perf_counter() - started
                print(
                    f"{name} cold, {done.stdout.strip()} s inside, {whole:.2f} s with Python's own start",
                    flush=True,
                )


def files(name: str, folder: str, batch: int) -> None:
    """From picture files to predictions: our Predictor by engine, and timm as its documentation has it."""
    from vitrail.predict import expand

    paths = expand([folder])
    with tempfile.TemporaryDirectory() as place:
        vitrail.create_model(name).save_pretrained(place)
        for engine in ("torch", "onnxruntime", "openvino"):
            predictor = vitrail.Predictor(place, engine=engine, batch_size=batch)
            predictor(paths[:batch])
            started = time.perf_counter()
            predictor(paths)
            rate = len(paths) / (time.perf_counter() - started)
            print(f"{name} from files, vitrail {predictor.engine.name}: {rate:.2f} images/s", flush=True)
        rate = timm_files(name, paths, batch)
        print(f"{name} from files, timm: {rate:.2f} images/s", flush=True)


def timm_files(name: str, paths: list[str], batch: int) -> float:
    """Images a second of timm's network with timm's own transform, picture by picture, in batches."""
    import timm
    from PIL import Image

    network = timm.create_model(name).eval()
    data: Any = timm.data
    transform: Any = data.create_transform(**data.resolve_model_data_config(network), is_training=False)

    def batch_of(part: list[str]) -> torch.Tensor:
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in part])

    with torch.inference_mode():
        network(batch_of(paths[:batch]))
        started = time.perf_counter()
        for first in range(0, len(paths), batch):
            network(batch_of(paths[first : first + batch])).softmax(dim=1).topk(5)
    return len(paths) / (time.perf_counter() - started)


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
    parser.add_argument("--files")
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    if given.cold:
        cold("vit_small_patch16_224")
    elif given.files:
        files(given.models[0], given.files, given.batch_size)
    else:
        print(f"{'network':30} {'engine':16} {'best/s':>8} {'median':>8} {'':>8}  batch {given.batch_size}")
        for name in TABLE if given.table else given.models:
            row(name, given.batch_size, given.rounds, given.engines)
    print(machine())


if __name__ == "__main__":
    main()
