"""The proof beside an artefact: its numbers, and the hashes of the files that they are about."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vitrail.disk import write_atomically
from vitrail.errors import WeightsError
from vitrail.weights.files import sha256


def proof_path(artefact: Path) -> Path:
    """The proof beside an artefact."""
    return _beside(artefact, "proof")


def refusal_path(artefact: Path) -> Path:
    """The numbers of an artefact that was not written; the one that stands in its place keeps its proof."""
    return _beside(artefact, "refused")


def write_proof(path: Path, proof: Any, about: dict[str, Any]) -> None:
    """The proof as JSON: whole or not at all."""
    view = {**about, **proof.to_dict()}
    write_atomically(path, (json.dumps(view, indent=2, ensure_ascii=False) + "\n").encode())


def hashes(artefact: Path) -> dict[str, str]:
    """SHA-256 of each file that computes: `graph` (or `program`), and `weights` where they lie beside it."""
    return {part: sha256(path) for part, path in _parts(artefact).items()}


def check_unchanged(artefact: Path) -> None:
    """Does nothing where no proof lies beside the artefact.

    Raises WeightsError where a file is not the one that the proof is about: damaged or replaced since.
    """
    proof = proof_path(artefact)
    try:
        view = json.loads(proof.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise WeightsError(f"{proof} cannot be read ({error}): export again, or remove it.") from None
    proven = view.get("sha256") if isinstance(view, dict) else None
    if not isinstance(proven, dict):
        return
    for part, path in _parts(artefact).items():
        now = sha256(path) if path.is_file() else "none"
        if proven.get(part, now) != now:
            raise WeightsError(
                f"{artefact}: its {part} is not the file that {proof.name} is about (sha256 now {now[:12]}, proven"
                f" {str(proven[part])[:12]}): it was damaged, replaced or lost since. Export again; to open it"
                " unproved, remove the proof."
            )


def _beside(artefact: Path, what: str) -> Path:
    # a folder may be called `.` or `..`, which is no name to put something behind
    place = artefact if artefact.name not in ("", "..") else Path(os.path.abspath(artefact))
    return place.with_name(f"{place.name}.{what}.json")


def _parts(artefact: Path) -> dict[str, Path]:
    if artefact.suffix.lower() == ".pt2":
        return {"program": artefact}
    if (artefact / "model.xml").is_file():
        return {"graph": artefact / "model.xml", "weights": artefact / "model.bin"}
    graph = artefact / "1" / "model.onnx" if artefact.is_dir() else artefact
    beside = graph.with_name(f"{graph.name}.data")
    return {"graph": graph, "weights": beside} if beside.is_file() else {"graph": graph}
