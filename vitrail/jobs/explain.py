"""`vitrail explain`: maps of where a model looks, for pictures; and how far to trust each method, for a data set."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.image import SUFFIXES, decode
from vitrail.data.sources import Source, open_pictures, open_splits
from vitrail.data.transforms import normalise
from vitrail.disk import write_atomically
from vitrail.errors import ConfigError, DataError, ImageError, UnsupportedError
from vitrail.explain.explainer import CHANCES, STEPS, Explainer, Explanation, cautions
from vitrail.explain.explorer_page import explorer
from vitrail.explain.faithfulness import fills_for, forwards
from vitrail.explain.methods import METHODS, Options, check_options, choose
from vitrail.explain.overlay import png
from vitrail.explain.questions import Asked, NothingThere
from vitrail.explain.still import held_still
from vitrail.explain.trace_words import IN_FLOAT32
from vitrail.explain.trial import Trial, cost, trial
from vitrail.jobs.opening import open_network
from vitrail.jobs.predict import free_name
from vitrail.predict import expand
from vitrail.runs import ExplainRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The explanations of one picture, and the files that hold them; or why there are none."""

    source: str
    explanations: tuple[Explanation, ...] = ()
    """One a method."""
    files: tuple[Path, ...] = ()
    error: str | None = None
    """Why the picture could not be explained; explanations and files are then empty."""

    @property
    def cautions(self) -> list[str]:
        """What must be said aloud beside the maps, with the methods that it concerns."""
        return cautions(self.explanations)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": self.source,
            "error": self.error,
            "explanations": [found.to_dict() for found in self.explanations],
            "files": [str(path) for path in self.files],
        }


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The table of methods over a data set, and the file that holds it."""

    trial: Trial
    path: Path
    """faithfulness.json; beside it faithfulness.md, the table for a document."""


def is_trial(run: ExplainRun) -> bool:
    """Whether a whole data set is to be scored, and not pictures one by one."""
    return run.score and not all(Path(path).suffix.lower() in SUFFIXES for path in run.images)


def explain(run: ExplainRun) -> Iterator[Explained]:
    """Explain pictures one after the other, and write each one's maps, records and page.

    A picture that cannot be read gets a record with its error, and so does one of several without such a box or region.

    Raises:
        ConfigError: an unknown class, method, layer, head or token; no such box or region in a picture that is alone.
        UnsupportedError: the method is not defined for the model; the message names those that are. DataError: a
        folder or pattern that holds no picture.
    """
    explainer, options, note = _opened(run)
    paths = expand(run.images)
    if not paths:
        raise DataError("There is no picture to explain: name files, folders or patterns.")
    methods = _methods(run.method, explainer, options, ("auto",))
    if run.score:
        each = forwards(2 + CHANCES, STEPS, len(fills_for(explainer.network)))
        _announce(explainer, len(paths) * len(methods) * each, "scoring")
    logger.info(IN_FLOAT32)
    yield from _explained(run, explainer, paths, methods, note)


def score(run: ExplainRun, watch: Callable[[int, int], None] | None = None) -> Scored:
    """Put the methods on trial over a data set: deletion and insertion with intervals, beside both controls.

    Raises what `explain` raises.
    """
    explainer, options, _ = _opened(run)
    if isinstance(explainer.network, Asked):
        raise UnsupportedError(
            f"{explainer.name} gives boxes or masks: methods are put on trial over a data set for classifiers only."
            " Name pictures: `vitrail explain MODEL PICTURE --score` scores the map of one box or region."
        )
    return _tried(run, explainer, options, watch)


def _opened(run: ExplainRun) -> tuple[Explainer, Options, str]:
    if run.samples < 0 or run.steps < 1:
        raise ConfigError(
            f"samples must be 0 or more and steps at least 1; got {run.samples} and {run.steps}."
        )
    network, note = open_network(run.model)
    explainer = Explainer(network, device=run.device)
    options = Options(
        layer=run.layer, head=run.head, token=run.token, steps=run.steps, grid=explainer.regions
    )
    return explainer, options, note


def _methods(names: Sequence[str], explainer: Explainer, options: Options, usual: Sequence[str]) -> list[str]:
    """The methods that were asked for, each once."""
    names = names or usual
    if "all" in names:
        names = explainer.methods
    chosen = list(dict.fromkeys(choose(explainer.network, name) for name in names))
    check_options(chosen, options)
    return chosen


def _explained(
    run: ExplainRun, explainer: Explainer, paths: list[str], methods: list[str], note: str
) -> Iterator[Explained]:
    taken: set[str] = set()
    for path in paths:
        try:
            found = [
                explainer(
                    path, run.class_, method, score=run.score, seed=run.seed, box=run.box,
                    **{name: getattr(run, name) for name in ("layer", "head", "token", "steps")
                       if name in METHODS[method].takes},
                )
                for method in methods
            ]  # fmt: skip
        except (ImageError, NothingThere, OSError) as error:
            if isinstance(error, NothingThere) and len(paths) == 1:
                raise  # the question can be fixed
            yield Explained(source=path, error=str(error))
            continue
        folder = Path(run.output) if run.output else Path("explain")
        if not run.output or len(paths) > 1:
            folder = folder / free_name(Path(path).stem, taken)
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        for one in found:
            files += _write(folder / f"{one.method}.png", png(one.overlay()))
            files += _write(folder / f"{one.method}.npy", _npy(one.values))
        record = {"note": note, "explanations": [one.to_dict() for one in found]}
        files += _write(
            folder / "explanation.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
        )
        if run.page:
            files += _write(folder / "explain.html", explorer(explainer, found, note).encode())
        yield Explained(source=path, explanations=tuple(found), files=tuple(files))


def _write(path: Path, data: bytes) -> list[Path]:
    write_atomically(path, data)
    return [path]


def _npy(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _tried(
    run: ExplainRun, explainer: Explainer, options: Options, watch: Callable[[int, int], None] | None
) -> Scored:
    methods = _methods(run.method, explainer, options, ("all",))
    source = _source(run.images)
    count = min(run.samples or len(source), len(source))
    numbers = np.random.default_rng(run.seed).permutation(len(source))[:count]
    logger.info("%d of %d pictures, methods: %s.", count, len(source), ", ".join(methods))
    _announce(explainer, cost(explainer, methods, count, options), "the trial")
    found = trial(
        explainer,
        (
            explainer.preprocess(decode(source.read(int(number)), name=source.name(int(number))))
            for number in numbers
        ),
        methods,
        options=options,
        seed=run.seed,
        watch=None if watch is None else lambda done: watch(done, count),
    )
    folder = Path(run.output) if run.output else Path("explain") / Path(run.images[0]).stem
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "faithfulness.json"
    write_atomically(path, (json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    write_atomically(path.with_suffix(".md"), found.to_markdown().encode())
    return Scored(trial=found, path=path)


def _source(paths: Sequence[str]) -> Source:
    """The pictures to score: those held back from training where the data says which, else all."""
    try:
        splits = open_splits(paths, val_share=0)
    except DataError:
        return open_pictures(paths)  # no classes: the predicted class is what is explained anyway
    for name in ("val", "test"):
        part: Source | None = getattr(splits, name)
        if part is not None:
            return part
    return splits.everything


def _announce(explainer: Explainer, count: float, what: str) -> None:
    """Say before it starts what it costs, from the time of one small batch."""
    wanted = explainer.engine.card.preprocessing
    images = normalise(
        torch.zeros(8, wanted.in_chans, *wanted.input_size, dtype=torch.uint8, device=explainer.device),
        wanted,
    )
    network = explainer.engine.network
    with held_still(network), torch.no_grad():
        network(images)
        begun = time.perf_counter()
        _wait(network(images))
        seconds = (time.perf_counter() - begun) / len(images)
    logger.info(
        "%s costs about %s forward passes, about %s.", what, f"{count:,.0f}", _duration(count * seconds)
    )


def _wait(output: Tensor | tuple[Any, ...]) -> None:
    """Until the device has computed it."""
    (output if isinstance(output, Tensor) else output[0]).sum().item()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
