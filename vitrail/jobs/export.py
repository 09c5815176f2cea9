"""`vitrail export`: a model as one file for other programs, proved on real pictures before it gets its name."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import vitrail
from vitrail.data.image import decode
from vitrail.data.sample import photographs
from vitrail.data.sources import Source, open_pictures, open_splits
from vitrail.data.transforms import Preprocess
from vitrail.engines import Engine
from vitrail.engines.artefact import format_of, open_artefact
from vitrail.engines.graph_cache import GraphCache
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError, DataError, ImageError, ProofError, WeightsError
from vitrail.export import onnx, openvino, quantise, torch_program, triton
from vitrail.export.manifest import Manifest, check_names
from vitrail.export.parity import Proof, prove
from vitrail.export.parity_dense import DenseProof
from vitrail.export.program import Program, capture, takes_one
from vitrail.export.proof_file import hashes, proof_path, refusal_path, write_proof
from vitrail.export.wrap import Deployed
from vitrail.jobs import export_dense
from vitrail.jobs.export_dense import DensePictures
from vitrail.runs import ExportRun
from vitrail.weights.card import Card
from vitrail.weights.folder import model_folder

logger = logging.getLogger(__name__)

BATCH = 16
"""Pictures that the proof shows at a time."""

ENDINGS = {"onnx": ".onnx", "openvino": "-openvino", "torch": ".pt2", "triton": "-triton"}

FLOAT32 = (
    "on a CPU with bf16 units OpenVINO computes in bfloat16 unless it is told otherwise; for float32, as in the proof:"
    ' core.compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})'
)
"""What readers of an OpenVINO folder in float32 must know."""

SHOWN = 5
"""Files in the way that are named."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what the proof found."""

    artefact: Path
    proof_file: Path
    proof: Proof | DenseProof
    manifest: Manifest
    size: int
    """Bytes of the artefact."""
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "artefact": str(self.artefact),
            "proof_file": str(self.proof_file),
            "proof": self.proof.to_dict(),
            "precision": self.manifest.precision,
            "free_size": self.manifest.free_size,
            "rows": self.manifest.rows._asdict(),
            "columns": self.manifest.columns._asdict(),
            "size": self.size,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def export(run: ExportRun, watch: Callable[[int, int], None] | None = None) -> Exported:
    """Write the artefact and its proof.

    The artefact is made under another name, opened by the engine that other verbs open it with, compared with the
    network on real pictures, and gets its own name only if it stays within the bounds. The numbers are written in any
    case: beside an artefact as its proof, with the hashes of its files, else as `NAME.refused.json`.

    Raises:
        ProofError: the artefact differs beyond the bounds; nothing but the numbers is left of it.
        ConfigError: int8 without pictures to calibrate with, a package that is missing, or a target in whose place
            something else stands.
        WeightsError: the folder holds no model, or one with more or fewer names than classes.
        DataError: data that cannot be used, or without a readable picture.
    """
    _check(run)
    started = time.monotonic()
    target = destination(run)
    _check_target(target, run)
    reference = TorchEngine(run.model, device="cpu", precision="fp32")
    check_names(reference.card, run.model)
    pictures: Pictures | DensePictures
    if reference.card.task == "image-classification":
        pictures = Pictures(run, reference)
    else:
        export_dense.check(run, reference.card.task)
        pictures = DensePictures(run, reference)
    program, manifest = _captured(run, reference)
    notes = (
        []
        if program.free_size or not run.free_size
        else ["height and width are fixed: the shapes inside follow the size"]
    )
    if run.format == "openvino" and not run.int8:
        notes.append(FLOAT32)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    work.mkdir()
    try:
        built, manifest, proof = _built(run, work, program, manifest, reference, pictures, watch)
        proof_file = _publish(run, built, target, manifest, proof)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if manifest.precision == "int8" and run.format == "openvino":
        _shelve(run.model, target)
    for note in (*notes, *pictures.notes):
        logger.info(note)
    return Exported(
        artefact=target,
        proof_file=proof_file,
        proof=proof,
        manifest=manifest,
        size=_bytes(target),
        seconds=time.monotonic() - started,
        notes=(*notes, *pictures.notes),
    )


def _captured(run: ExportRun, reference: TorchEngine) -> tuple[Program, Manifest]:
    """The network as a program, normalising inside, and what its file will say of itself."""
    deployed = Deployed(reference.network)
    program = capture(deployed, free_size=run.free_size)
    if run.format == "torch" and program.free_size and not takes_one(program):
        logger.info("with a free size the program would refuse a single picture: the size is fixed")
        program = capture(deployed, free_size=False)
    return program, Manifest(
        card=reference.card,
        free_size=program.free_size,
        rows=program.rows,
        columns=program.columns,
        outputs=program.outputs,
        normalised_inside="folded" if deployed.folded else "computed",
        source_sha256=reference.card.sha256,
    )


def _publish(
    run: ExportRun, built: Path, target: Path, manifest: Manifest, proof: Proof | DenseProof
) -> Path:
    """Give a proven artefact its name, and its proof a place beside it, which is returned.

    Raises ProofError for one that is not proven; its numbers are written, and what stood there before stays.
    """
    about: dict[str, Any] = {"artefact": target.name, "format": run.format, "model": run.model}
    about |= {"vitrail": vitrail.__version__, "torch": torch.__version__}
    about["quantisation"] = dict(manifest.quantisation)
    refusal, proof_file = refusal_path(target), proof_path(target)
    if not proof.passed:
        write_proof(refusal, proof, about)
        raise ProofError(
            f"{target} was not written, because it would not answer as {run.model} does:"
            f" {'; '.join(proof.failures)}. The numbers are in {refusal}."
        )
    _check_target(target, run)  # again: others may have put something there meanwhile
    # Both wait whole for their names, so that a full disk cannot leave one beside the other's predecessor.
    ready = built.with_name("proof.json")
    write_proof(ready, proof, {**about, "sha256": hashes(built)})
    _place(built, target)
    os.replace(ready, proof_file)
    refusal.unlink(missing_ok=True)
    return proof_file


def destination(run: ExportRun) -> Path:
    """Where the artefact goes."""
    if run.output:
        return Path(run.output)
    folder = model_folder(run.model)
    name = folder.parent.name if folder.name == "model" else folder.name
    return Path("export") / f"{name}{'-int8' if run.int8 else ''}{ENDINGS[run.format]}"


class Pictures:
    """Decoded pictures with their classes, for the proof: the run's data, else photographs without classes."""

    def __init__(self, run: ExportRun, reference: Engine) -> None:
        self.notes: list[str] = []
        self.source: Source | None = None
        self.labelled = False
        self.name = "cuttings of two photographs"
        if not run.data:
            return
        self.name = ", ".join(Path(path).name for path in run.data)
        try:
            splits = open_splits(run.data)
        except DataError as error:  # a folder of pictures will do; what is neither says so itself
            self.source = open_pictures(run.data).sample(run.samples, run.seed)
            self.notes.append(f"accuracy is not measured: {error}")
            return
        source = splits.scored
        known = _known(source, reference.card)
        self.labelled = isinstance(known, Source)
        if isinstance(known, str):
            self.notes.append(f"accuracy is not measured: {known}")
        self.source = (known if isinstance(known, Source) else source).sample(run.samples, run.seed)

    def __iter__(self) -> Iterator[tuple[Sequence[Tensor], Sequence[int] | None]]:
        if self.source is None:
            pictures = photographs()
            for first in range(0, len(pictures), BATCH):
                yield pictures[first : first + BATCH], None
            return
        for first in range(0, len(self.source), BATCH):
            numbers = range(first, min(first + BATCH, len(self.source)))
            read = [(self._read(number), int(self.source.labels[number])) for number in numbers]
            kept = [(picture, label) for picture, label in read if picture is not None]
            if kept:
                yield (
                    [picture for picture, _ in kept],
                    [label for _, label in kept] if self.labelled else None,
                )

    def __len__(self) -> int:
        return len(photographs()) if self.source is None else len(self.source)

    def _read(self, number: int) -> Tensor | None:
        assert self.source is not None
        try:
            return decode(self.source.read(number), name=self.source.name(number))
        except ImageError as error:
            if (note := f"left out: {error}") not in self.notes:  # every proof looks at it again
                self.notes.append(note)
            return None


def answering(engine: Engine) -> Callable[[Sequence[Tensor]], Tensor]:
    """An engine with the preprocessing of its own card, from decoded pictures on."""
    preprocess = Preprocess(engine.card.preprocessing)

    def answer(pictures: Sequence[Tensor]) -> Tensor:
        return engine(torch.stack([preprocess(picture) for picture in pictures]))

    return answer


class Remembered:
    """Answers to the same pictures in the same order, computed once for any number of proofs."""

    def __init__(self, answer: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.answer, self.given, self.place = answer, list[Tensor](), 0

    def again(self) -> Remembered:
        """From the first pictures on."""
        self.place = 0
        return self

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        if self.place == len(self.given):
            self.given.append(self.answer(pictures))
        self.place += 1
        return self.given[self.place - 1]


def _built(
    run: ExportRun,
    work: Path,
    program: Program,
    manifest: Manifest,
    reference: TorchEngine,
    pictures: Pictures | DensePictures,
    watch: Callable[[int, int], None] | None,
) -> tuple[Path, Manifest, Proof | DenseProof]:
    """The artefact under its working name, with the proof in its manifest."""
    expected = Remembered(answering(reference))

    def proved(path: Path) -> Proof | DenseProof:
        candidate = open_artefact(path)
        count: Callable[[int], None] | None = (
            None if watch is None else lambda done: watch(done, len(pictures))
        )
        if isinstance(pictures, DensePictures):
            return export_dense.prove(reference, candidate, pictures, count)
        return prove(
            expected.again(),
            answering(candidate),
            pictures,
            precision=candidate.precision,
            pictures=pictures.name,
            watch=count,
        )

    if run.format == "torch":
        path = work / "model.pt2"
        torch_program.write_program(program, path, manifest)
        proof = proved(path)
        manifest = _with_proof(manifest, proof)
        torch_program.write_program(program, path, manifest)
        return path, manifest, proof
    stem = "model" if run.format == "triton" else destination(run).stem
    graph = work / f"{stem}.onnx"  # the weights beside a large one are found by its name
    onnx.write_onnx(program, graph, manifest)
    if run.int8:
        return _quantised(run, work, graph, manifest, reference, proved)
    if run.format == "openvino":
        folder = work / "openvino"
        openvino.write_openvino(openvino.from_onnx(graph), folder, manifest)
        proof = proved(folder)
        manifest = _with_proof(manifest, proof)
        openvino.write_openvino(openvino.from_onnx(graph), folder, manifest)
        return folder, manifest, proof
    proof = proved(graph)
    manifest = _with_proof(manifest, proof)
    onnx.replace_manifest(graph, manifest)
    if run.format == "onnx":
        return graph, manifest, proof
    folder = work / "triton"
    triton.write_triton(graph, folder, manifest)
    return folder, manifest, proof


def _quantised(
    run: ExportRun,
    work: Path,
    graph: Path,
    manifest: Manifest,
    reference: TorchEngine,
    proved: Callable[[Path], Proof | DenseProof],
) -> tuple[Path, Manifest, Proof | DenseProof]:
    """The first way of quantising that stays within the bounds; else the last one, with its failures."""
    preprocess = Preprocess(reference.card.preprocessing)
    batches = [torch.stack([preprocess(picture) for picture in part]).numpy() for part in _calibration(run)]
    folder = work / "openvino"
    for rung in quantise.ladder(graph):
        logger.info("quantising: %s", rung.words)
        model = quantise.quantise(graph, batches, rung)
        done, products = quantise.quantised_products(model)
        how = {
            "method": "NNCF post-training",
            "choice": rung.words,
            "int8_products": done,
            "products": products,
            "calibrated_on": ", ".join(Path(path).name for path in run.calibrate),
            "calibration_images": sum(map(len, batches)),
        }
        manifest = replace(manifest, precision="int8", quantisation=how, proof={})
        openvino.write_openvino(model, folder, manifest)
        proof = proved(folder)
        if proof.passed:
            break
        logger.info("not within the bounds: %s", "; ".join(proof.failures))
    manifest = _with_proof(manifest, proof)
    openvino.write_openvino(model, folder, manifest)
    return folder, manifest, proof


def _calibration(run: ExportRun) -> Iterator[list[Tensor]]:
    """Decoded pictures for the calibration, a few at a time; unreadable ones are passed over."""
    splits = open_splits(run.calibrate)
    source = splits.train if splits.train is not None and "train" in splits.given else splits.everything
    source = source.sample(run.calibration_samples, run.seed)
    ready: list[Tensor] = []
    for number in range(len(source)):
        try:
            ready.append(decode(source.read(number), name=source.name(number)))
        except ImageError:
            continue
        if len(ready) == BATCH:
            yield ready
            ready = []
    if ready:
        yield ready


def _check(run: ExportRun) -> None:
    if run.int8 and not run.calibrate:
        raise ConfigError(
            "int8 needs pictures to calibrate with: --calibrate DATA (training pictures are best)."
        )
    if run.int8 and run.format != "openvino":
        raise ConfigError(f"int8 is written as --format openvino; got {run.format}.")
    if run.samples < 0 or run.calibration_samples < 1:
        raise ConfigError(
            f"samples must be at least 0 and calibration-samples at least 1; got {run.samples} and"
            f" {run.calibration_samples}."
        )


def _check_target(target: Path, run: ExportRun) -> None:
    """Only an artefact of the same kind may be replaced, and a target is named as its readers expect.

    Raises ConfigError.
    """
    ending = {"onnx": ".onnx", "torch": ".pt2"}.get(run.format)
    if ending and target.suffix.lower() != ending:
        raise ConfigError(f"A file of the format {run.format} ends in {ending}; got --output {target}.")
    if not ending and (target.is_file() or target.suffix.lower() in (".xml", ".onnx", ".pt2")):
        raise ConfigError(
            f"The format {run.format} is a folder, and {target} names a file: name a folder, such as"
            f" --output {target.with_suffix('')}{ENDINGS[run.format]}."
        )
    if not target.exists():
        return
    if format_of(target) != run.format:
        raise ConfigError(
            f"{target} exists and is no {run.format} export, so it is not replaced: give another --output."
        )
    if not ending:
        _check_ours(target, openvino if run.format == "openvino" else triton)


def _check_ours(folder: Path, written: ModuleType) -> None:
    """A folder is replaced as a whole, so it must be an export of ours and hold nothing else.

    written: the module of its format. Raises ConfigError that names what would be lost.
    """
    try:
        written.read_manifest(folder)
        own, what = (".", *written.FILES), "holds more than an export"
    except WeightsError:
        own, what = (".",), "is no export of vitrail that can be read"
    inside = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    foreign = [
        f"{name}/" if path.is_dir() else name
        for name, path in inside.items()
        if name not in own and Path(name).parent.as_posix() in own
    ]
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ConfigError(
            f"{folder} {what}, so it is not replaced: {', '.join(foreign[:SHOWN])}{more} would go with it. Move that"
            " away, or give another --output."
        )


def _known(source: Source, card: Card) -> Source | str:
    """The source with the model's class numbers; or why the two do not fit, so that only answers are compared."""
    if card.labels is None:
        if len(source.classes) == card.num_classes:
            return source
        return f"the data has {len(source.classes)} classes, the model {card.num_classes} without names"
    try:
        return source.called(card.names).relabel(card.labels)
    except DataError as error:
        return str(error)


def _with_proof(manifest: Manifest, proof: Proof | DenseProof) -> Manifest:
    """The manifest with the proof's numbers, and the accuracy that the artefact itself reached on its card."""
    scores = dict(manifest.card.scores)
    if isinstance(proof, DenseProof):
        if proof.score_after is not None:
            scores |= {f"exported_{proof.score}": proof.score_after, "exported_images": proof.labelled}
    elif proof.accuracy_after is not None:
        scores |= {"exported_acc1": proof.accuracy_after, "exported_images": proof.labelled}
    return replace(manifest, card=replace(manifest.card, scores=scores), proof=proof.to_dict())


def _place(built: Path, target: Path) -> None:
    """Give the artefact its name; what was there before goes only then."""
    beside = built.with_name(built.name + ".data")
    if beside.exists():
        os.replace(beside, target.parent / beside.name)
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    if target.is_dir():
        os.replace(target, old)
    os.replace(built, target)
    shutil.rmtree(old, ignore_errors=True)


def _shelve(model: str, folder: Path) -> None:
    """Keep a copy with the model, where `--precision int8` finds it."""
    place = GraphCache(model).folder()
    place.mkdir(parents=True, exist_ok=True)
    fresh = place / f".int8.{secrets.token_hex(4)}"
    shutil.copytree(folder, fresh)
    _place(fresh, place / "int8")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
