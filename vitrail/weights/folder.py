"""A saved model is a folder: config.json, model.safetensors, preprocessor_config.json, README.md.

Files are written under temporary names first and renamed together at the end, weights before config.json, whose
SHA-256 names the weights it belongs to. A save that is cut short leaves the folder as it was; one that is cut
between the renames is finished by the next load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.disk import flush_folder
from vitrail.errors import WeightsError, suggestion
from vitrail.weights import files, shipped
from vitrail.weights.card import Card

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
README = "README.md"
PENDING = ".config.json.pending"
MARK = "<!-- written by vitrail; delete this line to keep your own text when the model is saved again -->"


def save(
    folder: str | Path,
    state: Mapping[str, Tensor],
    card: Card,
    library: Mapping[str, Any] | None = None,
) -> Card:
    """Write a model folder; what else lies in it stays.

    Args:
        folder: made if it is not there.
        state: tensors under the names of `card.layout`.
        card: goes to config.json, preprocessor_config.json and README.md.
        library: keys of config.json in another library's own words (`Layout.describe`).

    Returns:
        The card with the hash of the weights.

    Raises:
        WeightsError: a file cannot be written (full disk, no permission); the folder is then as it was.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise WeightsError(f"{place} is a file; a model is saved as a folder.")
    for name in (WEIGHTS, PREPROCESSOR, README, CONFIG, PENDING):
        files.sweep(place / name)
    weights = _stage_weights(place, state)
    pending: list[tuple[Path, Path]] = [(weights, place / WEIGHTS)]
    try:
        card = replace(card, sha256=files.sha256(weights))
        config = _text(card.to_json(library))
        texts = {PREPROCESSOR: _text(card.preprocessor_json()), README: readme(card), CONFIG: config}
        if not _ours_to_write(place / README):
            del texts[README]
        for name, text in texts.items():
            pending.append((_stage_text(place / name, text), place / name))
        os.replace(_stage_text(place / PENDING, config), place / PENDING)
        flush_folder(place)
        for temporary, final in pending:
            os.replace(temporary, final)
    except OSError as error:
        raise WeightsError(f"{place} cannot be written: {error}.") from error
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)
    (place / PENDING).unlink(missing_ok=True)
    flush_folder(place)
    return card


def load(folder: str | Path, *, finite: bool = False) -> tuple[dict[str, Tensor], Card]:
    """Tensors and card of a folder that vitrail, timm or transformers wrote; of a run folder, its model.

    A card without a hash gets the hash of what was read.

    Raises:
        WeightsError: there are no weights, a file is torn or not what it should be, or the weights are not those
            that the card was written for.
    """
    place = model_folder(folder)
    card = read_card(place)
    found = files.weight_files(place)
    before = [file.stat() for file in found]
    digest = files.sha256(found[0]) if len(found) == 1 else ""
    if card.sha256 and card.sha256 != digest:
        card = _interrupted(place, digest) or card
    if card.sha256 and card.sha256 != digest:
        raise WeightsError(
            f"{found[0]} is not the file that {place / CONFIG} was written for (SHA-256 {digest[:12]}, expected"
            f" {card.sha256[:12]}): it was changed or damaged. Copy the folder again, or save the model again."
        )
    tensors = files.read_tensors(place, finite=finite)
    after = [file.stat() for file in found]
    if [(s.st_ino, s.st_size, s.st_mtime_ns) for s in before] != [
        (s.st_ino, s.st_size, s.st_mtime_ns) for s in after
    ]:
        raise WeightsError(f"{place} was changed while it was read; load it again.")
    return tensors, replace(card, sha256=digest)


def read_card(folder: str | Path) -> Card:
    """The card of a model folder, without its weights; an empty one where there is no config.json.

    Raises:
        WeightsError: config.json or preprocessor_config.json is no JSON, or holds values that are not legal.
    """
    place = model_folder(folder)
    preprocessor = files.read_json(place / PREPROCESSOR) if (place / PREPROCESSOR).exists() else None
    if not (place / CONFIG).exists():
        return Card.from_json({}, preprocessor)
    try:
        return Card.from_json(files.read_json(place / CONFIG), preprocessor)
    except WeightsError as error:
        raise WeightsError(f"{place}: {error}") from None


def model_folder(folder: str | Path) -> Path:
    """The model's folder that a path or a name means (`find`). Raises WeightsError where there is none."""
    place = find(folder)
    if place is None:
        if Path(folder).is_file():
            raise WeightsError(
                f"{folder} is a file, and a model folder is asked for. `vitrail convert` makes one of a weight file;"
                " what export wrote predicts, is evaluated and served, but holds no network to look into or train."
            )
        ships = ", ".join(shipped.names())
        near = suggestion(str(folder), shipped.names())
        raise WeightsError(
            f"{folder} is no folder{f', and no model that ships ({ships})' if ships else ''}.{near}"
            f"{files.hub_cure(folder)}"
        )
    if (place / "metrics.jsonl").exists() and not (place / CONFIG).exists():
        raise WeightsError(
            f"{place} is a run that has not written its model yet: wait until it has ended, or stop it with Ctrl-C,"
            " and it writes what it has learned."
        )
    return place


def find(folder: str | Path) -> Path | None:
    """A folder itself, `model/` in it where it is a run folder, or the model of that name that ships; else None."""
    place = Path(folder)
    if not place.is_dir():
        return shipped.by_full_name(str(folder))
    inner = place / "model"
    return inner if not (place / CONFIG).exists() and (inner / CONFIG).exists() else place


def on_disk(name: str) -> bool:
    """Whether a name means a folder, a file or a model that ships, rather than a network with random weights."""
    return find(name) is not None or Path(name).exists()


def readme(card: Card) -> str:
    """The card for people, with the front matter that model hubs read."""
    wanted = card.preprocessing
    front = ["---", f"pipeline_tag: {card.task}", "library_name: vitrail"]
    front += [f"license: {card.licence}"] if card.licence else []
    lines = [*front, "---", "", MARK, "", f"# {card.architecture or 'model'}", ""]
    rows = [
        ("Task", card.task),
        ("Classes", _classes(card)),
        (
            "Input",
            f"{wanted.in_chans} x {wanted.input_size[0]} x {wanted.input_size[1]}, {wanted.interpolation},"
            f" crop {wanted.crop_pct:g} ({wanted.crop_mode}), mean {_numbers(wanted.mean)}, std {_numbers(wanted.std)}",
        ),
        ("Data", card.data),
        ("Source", card.source),
        ("Licence", card.licence),
        ("Scores", ", ".join(f"{name} {_figure(value)}" for name, value in card.scores.items())),
        ("SHA-256 of model.safetensors", card.sha256),
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)]
    lines += ["", card.notes] if card.notes else []
    use = ["```", "vitrail predict FOLDER IMAGES...", "vitrail evaluate FOLDER DATA", "```"]
    return "\n".join([*lines, "", "Use it, with FOLDER for this folder:", "", *use, ""])


def _stage_weights(place: Path, state: Mapping[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return files.staged(
        place / WEIGHTS, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"})
    )


def _stage_text(path: Path, text: str) -> Path:
    return files.staged(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _interrupted(place: Path, digest: str) -> Card | None:
    """The card of a save that was cut between its renames, if it belongs to the weights; the save is finished."""
    pending = place / PENDING
    if not pending.exists():
        return None
    card = Card.from_json(files.read_json(pending))
    if card.sha256 != digest:
        return None
    os.replace(pending, place / CONFIG)
    return card


def _ours_to_write(path: Path) -> bool:
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def _classes(card: Card) -> str:
    if card.labels is None:
        return "" if card.num_classes is None else str(card.num_classes)
    names = ", ".join(card.labels[:10])
    return f"{len(card.labels)}: {names}{', ...' if len(card.labels) > 10 else ''}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _text(view: Mapping[str, Any]) -> str:
    return json.dumps(view, indent=2, ensure_ascii=False) + "\n"


def _figure(score: float) -> str:
    """Counts whole, shares and losses with four digits."""
    return f"{score:,.0f}" if score > 1 and float(score).is_integer() else f"{score:.4f}"
