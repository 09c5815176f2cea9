"""The torch file: a torch.export program (.pt2) with the card as an extra file of its archive."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch

from vitrail.disk import write_through
from vitrail.errors import WeightsError
from vitrail.export.manifest import KEY, Manifest
from vitrail.export.onnx import quiet
from vitrail.export.program import Program

EXTRA = f"{KEY}.json"


def write_program(program: Program, path: Path, manifest: Manifest) -> None:
    """Write a program, with its manifest inside."""
    archive = io.BytesIO()  # torch ends the whole process where a disk is full
    with quiet():
        torch.export.save(program.exported, archive, extra_files={EXTRA: manifest.to_text()})
    write_through(path, archive.getbuffer())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a file, without loading the program. Raises WeightsError where there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"extra/{EXTRA}")]
            text = archive.read(names[0]).decode() if names else ""
    except (zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{path} is no torch.export archive ({error}); export it again.") from None
    return Manifest.from_text(text, str(path))
