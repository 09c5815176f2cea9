"""Which engine: measured on this machine, on this model, once, and written down beside the graph.

Nothing is prepared for a handful of pictures: where torch would be done within `WORTH_SECONDS` seconds, torch it is. An
engine counts only if its logits agree with torch's on real photographs, within the bounds of its precision.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from vitrail.data.dense_loader import pad_together
from vitrail.data.sample import photographs
from vitrail.data.transforms import Preprocess, colour
from vitrail.engines.graph_cache import GraphCache
from vitrail.errors import ProofError, VitrailError
from vitrail.export.parity import BOUNDS, Bounds, Proof, prove
from vitrail.export.parity_dense import DenseProof, answering, prove_dense
from vitrail.tasks.registry import make_task

logger = logging.getLogger(__name__)

QUICK = ("openvino", "onnxruntime")
"""Engines that need a prepared graph, the one that is more often the quicker first."""

WORTH_SECONDS = 60.0
"""Seconds of work on torch above which preparing a graph (10 to 40 s) and measuring is tried."""

LEAST_SPEEDUP = 1.05
"""How much quicker than torch an engine must be to be chosen."""

PHOTOGRAPHS = 16
"""Photographs on which engines are compared with torch."""

DENSE_PHOTOGRAPHS = 4
"""The same for boxes and masks, whose pictures cost more and say more."""


CHOICE_BOUNDS = {"bf16": Bounds(logits=0.05, agreement=0.99)}
"""Bounds of the choice where they are not those of an export: of so few photographs, strange to many a model, one
whose two best classes lie within bf16's rounding would decide alone."""


def installed() -> list[str]:
    """The quick engines whose packages are here."""
    found = []
    for name in QUICK:
        try:
            version(name)
            found.append(name)
        except PackageNotFoundError:
            continue
    return found


def circumstances(precision: str, batch_size: int) -> str:
    """What a measurement holds for: another machine, thread count, batch, precision or version asks again."""
    versions = " ".join(f"{name}-{version(name)}" for name in installed())
    return (
        f"{platform.machine()} {platform.processor()} {torch.get_num_threads()} threads, batch"
        f" {batch_size}, {precision}, torch-{torch.__version__} {versions}"
    )


def open_prepared(graphs: GraphCache, name: str, precision: str, network: Any = None) -> Any:
    """A quick engine on the cached graph, which is made if it is not there."""
    graph = graphs.prepare(network)
    if name == "openvino":
        from vitrail.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(graph, precision=precision, cache=graph.parent / "openvino")
    from vitrail.engines.onnx import OnnxEngine

    return OnnxEngine(graph)


def remembered(graphs: GraphCache, precision: str) -> tuple[str, str] | None:
    """The engine that was the quickest here before, at whatever batch, and why; None where nobody knows."""
    if graphs.graph() is None:
        return None
    for known, row in reversed(graphs.measurements().items()):
        batch = row.get("batch", 0)
        if known == circumstances(precision, batch) and row.get("chosen") in (*QUICK, "torch"):
            return str(row["chosen"]), str(row["why"])
    return None


def measure(graphs: GraphCache, network: Any, torch_engine: Any, precision: str, batch_size: int) -> Any:
    """The quickest engine that agrees with torch, opened; what was found is written down.

    Returns the torch engine itself where none is quicker.
    """
    candidates: dict[str, Any] = {"torch": torch_engine}
    proofs: dict[str, Proof | DenseProof] = {}
    for name in installed():
        try:
            engine = open_prepared(graphs, name, precision, network)
            proofs[name] = check(torch_engine, engine, graphs)
        except Exception as error:
            logger.warning("engine %s cannot be used here: %s", name, _line(error))
            continue
        if proofs[name].passed:
            candidates[name] = engine
        else:
            logger.warning("engine %s is left out: %s", name, "; ".join(proofs[name].failures))
    rates = speeds(candidates, _example(graphs, batch_size))
    best = max(rates, key=lambda name: rates[name])
    chosen = best if rates[best] >= LEAST_SPEEDUP * rates["torch"] else "torch"
    others = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items() if name != chosen)
    why = f"{rates[chosen]:.1f} images/s here at batch {batch_size}" + (f" ({others})" if others else "")
    if chosen in proofs:
        why += f"; logits agree with torch to {proofs[chosen].logits_max:.0e}"
    row = {"chosen": chosen, "why": why, "batch": batch_size, "rates": rates}
    row["proofs"] = {name: proof.to_dict() for name, proof in proofs.items()}
    graphs.record({circumstances(precision, batch_size): row})
    logger.info("engine %s, %s: %s", chosen, candidates[chosen].precision, why)
    return candidates[chosen]


def check(reference: Any, engine: Any, graphs: GraphCache) -> Proof | DenseProof:
    """How far an engine differs from another on real photographs."""
    prepare = Preprocess(graphs.card.preprocessing)
    # torch itself in bfloat16 is no measure for others: bounds are those of the looser precision of the two
    precision = "bf16" if "bf16" in (reference.precision, engine.precision) else engine.precision
    if graphs.card.task != "image-classification":
        return check_dense(reference, engine, prepare, precision)
    images = photographs(PHOTOGRAPHS)

    def answer(through: Any) -> Any:
        def logits(pictures: Sequence[Tensor]) -> Tensor:
            found: Tensor = through(torch.stack([prepare(picture) for picture in pictures]))
            return found

        return logits

    return prove(
        answer(reference), answer(engine), [(images, None)], precision=precision, pictures="photographs",
        bounds=CHOICE_BOUNDS.get(precision, BOUNDS[precision]),
    )  # fmt: skip


def check_dense(reference: Any, engine: Any, prepare: Preprocess, precision: str) -> DenseProof:
    """The same of boxes and masks, on fewer photographs."""
    labels = reference.card.labels or tuple(f"class {number}" for number in range(reference.classes))
    batches = [
        (*pad_together([prepare(picture)], colour(prepare.preprocessing)), None)
        for picture in photographs(DENSE_PHOTOGRAPHS)
    ]
    return prove_dense(
        answering(reference), answering(engine), batches, make_task(reference.card.task, labels),
        precision=precision, pictures="photographs",
    )  # fmt: skip


def proven(graphs: GraphCache, engine: Any) -> str:
    """How an engine on the cached graph agrees with torch in float32: measured at its first use, then known.

    Raises ProofError where it differs beyond the bounds.
    """
    key = f"proof of {engine.name}, {circumstances(engine.precision, 0)}"
    kept = graphs.measurements().get(key)
    kind: Any = Proof if graphs.card.task == "image-classification" else DenseProof
    proof: Any = kind.from_dict(kept) if kept else None
    if proof is None:
        from vitrail.engines.pytorch import TorchEngine

        proof = check(TorchEngine(graphs.model, device="cpu", precision="fp32"), engine, graphs)
        graphs.record({key: proof.to_dict()})
    if not proof.passed:
        raise ProofError(f"it strays from torch: {'; '.join(proof.failures)}")
    if engine.precision == "fp32":
        return f"logits agree with torch to {proof.logits_max:.0e}"
    what = proof.things if isinstance(proof, DenseProof) else "the first classes"
    return f"on {proof.images} photographs {what} agree with torch in {100 * proof.agreement:.0f} %"


def speeds(engines: dict[str, Any], images: Tensor, rounds: int = 3) -> dict[str, float]:
    """Images a second of each, best of some rounds in turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine(images)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: len(images) / min(kept) for name, kept in times.items()}


def seconds_on(engine: Any, graphs: GraphCache, images: int, batch_size: int) -> float:
    """About how long an engine takes for so many pictures."""
    one = _example(graphs, min(batch_size, images, 4))
    engine(one[:1])
    started = time.perf_counter()
    engine(one)
    return images / len(one) * (time.perf_counter() - started)


def _example(graphs: GraphCache, batch_size: int) -> Tensor:
    prepare = Preprocess(graphs.card.preprocessing)
    pictures = photographs(PHOTOGRAPHS)
    return torch.stack([prepare(pictures[number % PHOTOGRAPHS]) for number in range(batch_size)])


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, VitrailError) else f"{type(error).__name__}: {text[:200]}"
