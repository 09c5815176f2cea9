"""`vitrail predict --cluster`: the same Predictor as a Ray Data job, over as many machines as Ray has.

Ray hands out the pictures, restarts workers that die and gives their work to others; nothing of that is ours. The
result is a folder of parquet files. It is also the memory of the job: what stands there is not looked at again, so
a job that was stopped goes on when it is started again, and every picture has exactly one record.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.engines import ENGINES
from vitrail.errors import ConfigError, DataError, require
from vitrail.jobs.opening import engine_for
from vitrail.predict import Predictor, expand
from vitrail.runs import PredictRun

logger = logging.getLogger(__name__)

ADDRESSES = ("source", "uri", "url", "path", "file", "file_name", "image_path", "name", "id")
"""Columns of a parquet that may name a picture, and, where there are no pictures in it, say where it lies."""

PICTURES = ("image", "bytes", "image_bytes", "content")
"""Columns of a parquet that may hold encoded pictures; `image` also as Hugging Face's pair of bytes and path."""

BLOCK = 1024
"""Most pictures in one piece of work: what a worker that dies has to do again."""


@dataclass(frozen=True, kw_only=True)
class ClusterPredictions:
    """What a job did."""

    folder: str
    """The parquet files."""
    total: int
    """Pictures that there are."""
    before: int
    """Pictures that stood in the folder already."""
    errors: int
    """Pictures that could not be read, of all; their rows say why."""
    workers: int
    engine: str
    precision: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is to be looked at: names alone, or a parquet that holds the pictures themselves."""

    names: list[str]
    parquet: str = ""
    column: str = ""
    """The column of the pictures in the parquet."""
    named_by: str = ""
    """The column of their names; empty where the pictures are pairs of bytes and path."""


def predict_on_cluster(run: PredictRun, *, progress: bool = False) -> ClusterPredictions:
    """Look at all pictures and write the records as parquet.

    Ray's own rules say where: the cluster of RAY_ADDRESS, or this machine. Model and pictures must be found under
    the same names on every machine.

    progress: let Ray show its bars.

    Raises:
        ConfigError: ray is not installed, or a flag that a cluster has no use for.
        DataError: nothing to look at, a parquet without usable columns, or names that occur twice.
    """
    require("ray", "pyarrow", extra="ray")
    started = time.monotonic()
    _check(run)
    pictures = find(run.images)
    folder = run.output or "predictions.parquet"
    folder = folder if "://" in folder else os.path.abspath(folder)
    told = already(folder)
    wanted = set(pictures.names)
    left = [name for name in pictures.names if name not in told]
    settings = worker_settings(run, len(left)) if left else {}
    workers = 0
    if left:
        ray = _connect(progress)
        workers = _workers(run, ray)
        logger.info(
            "%d pictures on %d workers, engine %s, %s%s", len(left), workers, settings["engine"],
            settings["precision"], f"; {len(told & wanted)} are in {folder} already" if told & wanted else "",
        )  # fmt: skip
        _compute(pictures, left, told, settings, workers, run, folder)
    rows, errors = _counted(folder, wanted)
    if rows != len(wanted):
        raise DataError(
            f"{folder} should tell {len(wanted)} pictures and tells {rows}; start the job again to look at the rest."
        )
    return ClusterPredictions(
        folder=folder,
        total=len(wanted),
        before=len(told & wanted),
        errors=errors,
        workers=workers,
        engine=settings.get("engine", ""),
        precision=settings.get("precision", ""),
        seconds=time.monotonic() - started,
    )


def find(images: Sequence[str]) -> Pictures:
    """The pictures of files, folders, patterns, addresses, lists of addresses (.txt), or one parquet.

    Raises:
        DataError: nothing to look at, or a parquet that names no pictures, or one name twice.
        ConfigError: a parquet beside other things.
    """
    tables = [item for item in images if _is_parquet(item)]
    if tables:
        if len(images) > 1:
            raise ConfigError(
                f"A parquet is looked at alone; got {len(images)} things. Start one job for each."
            )
        return _in_parquet(tables[0])
    names: list[str] = []
    for item in images:
        if "://" in item:
            names.append(item)
        elif item.endswith(".txt") and os.path.isfile(item):
            lines = Path(item).read_text(encoding="utf-8").splitlines()
            names += [_absolute(line.strip()) for line in lines if line.strip()]
        else:
            names += [os.path.abspath(path) for path in expand([item])]
    if not names:
        raise DataError(
            "There is no image to look at: name files, folders, patterns, a .txt list or a parquet."
        )
    return Pictures(names=list(dict.fromkeys(names)))


def already(folder: str) -> set[str]:
    """The pictures that a folder of results tells. A file that was cut off while it was written is removed."""
    found: set[str] = set()
    for file, table in _tables(folder, ["source"], remove_torn=True):
        names = table.column("source").to_pylist()
        if len(names) != len(set(names)) or found & set(names):
            raise DataError(f"{file} tells a picture that was told before; give another --output.")
        found |= set(names)
    return found


class Worker:
    """What runs in each process: a Predictor, called with tables of pictures."""

    def __init__(self, settings: dict[str, Any], told: frozenset[str]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        self.settings, self.told = settings, told
        self.predictor = Predictor(
            settings["model"], settings["engine"], settings["precision"], device=settings["device"],
            batch_size=settings["batch_size"], top_k=settings["top_k"], threshold=settings["threshold"],
        )  # fmt: skip
        if settings["window"]:
            from vitrail.engines.sliding import SlidingEngine

            self.predictor.engine = SlidingEngine(self.predictor.engine, settings["window"])

    def __call__(self, table: Any) -> Any:
        """The records of a table of pictures, as a table."""
        import pyarrow

        rows = [(name, picture) for name, picture in self._rows(table) if name not in self.told]
        records: list[dict[str, Any]] = []
        ready: list[tuple[str, Any]] = []
        for name, picture in rows:
            try:
                ready.append((name, fetch(name) if picture is None else picture))
            except Exception as error:  # an address fails in as many ways as there are kinds of address
                records.append(self.predictor.failure(name, _one_line(error)).to_dict())
        for (name, _), record in zip(ready, self.predictor.stream([item for _, item in ready]), strict=True):
            records.append(record.to_dict() | {"source": name} | _mask(record, len(self.predictor.labels)))
        schema = layout(self.predictor.engine.card.task)
        return pyarrow.Table.from_pylist(records, schema=schema)

    def _rows(self, table: Any) -> Iterable[tuple[str, Any]]:
        """Names and pictures; None for a picture that lies under its name."""
        column, named_by = self.settings["column"], self.settings["named_by"]
        if not column:
            return ((name, None) for name in table.column("source").to_pylist())
        held = table.column(column).to_pylist()
        if named_by:
            names = [str(name) for name in table.column(named_by).to_pylist()]
            held = [item["bytes"] if isinstance(item, dict) else item for item in held]
            return zip(names, held, strict=True)
        return ((str(item["path"]), item["bytes"]) for item in held)


def fetch(name: str) -> Any:
    """What the Predictor takes for a name: a path as it is, an address (s3://, https://, ...) as its bytes."""
    if "://" not in name:
        return name
    import fsspec

    with fsspec.open(name, "rb") as file:
        return file.read()


def layout(task: str) -> Any:
    """The columns of the result, a pyarrow.Schema: those of `vitrail predict --format jsonl`; masks as index PNG."""
    import pyarrow as pa

    text, number, real = pa.string(), pa.int64(), pa.float64()
    guess = pa.struct([("label", text), ("index", number), ("score", real)])
    box = pa.struct([("bbox", pa.list_(real)), ("label", text), ("index", number), ("score", real)])
    share = pa.struct([("label", text), ("index", number), ("pixels", number), ("share", real)])
    size = [("height", number), ("width", number)]
    own = {
        "object-detection": [*size, ("detections", pa.list_(box))],
        "image-segmentation": [*size, ("classes", pa.list_(share)), ("mask", pa.binary())],
    }
    plain = [("label", text), ("index", number), ("score", real), ("predictions", pa.list_(guess))]
    return pa.schema([("source", text), *own.get(task, plain), ("error", text)])


def _mask(record: Any, classes: int) -> dict[str, bytes]:
    if getattr(record, "mask", None) is None:
        return {}
    from vitrail.tasks.draw_dense import index_png

    return {"mask": index_png(record.mask.numpy(), classes)}


def _check(run: PredictRun) -> None:
    if run.merge_tokens:
        raise ConfigError("merge-tokens is measured on one machine; leave it or --cluster out.")
    if run.format != "table" or run.draw is not None:
        raise ConfigError("A cluster writes parquet into the folder --output: leave --format and --draw out.")


def worker_settings(run: PredictRun, images: int) -> dict[str, Any]:
    """What each worker needs to open the model: the engine is chosen here, once, for all of them."""
    engine: Any = Predictor(run.model, run.engine, run.precision, device=run.device).engine
    engine = engine_for(engine, run, images)
    return {
        "model": os.path.abspath(run.model) if os.path.exists(run.model) else run.model,
        "engine": engine.name if engine.name in ENGINES else "auto",
        "precision": engine.precision if engine.name in ENGINES else "auto",
        "device": run.device,
        "batch_size": 1 if run.window else run.batch_size,
        "top_k": run.top_k,
        "threshold": run.threshold,
        "window": run.window,
        "threads": 1,
        "column": "",
        "named_by": "",
    }


def _connect(progress: bool) -> Any:
    """Ray, on the cluster that its own settings name, else on this machine; it reports nothing to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own notes are not wanted: what fails comes back as an error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = progress
    return ray


def _workers(run: PredictRun, ray: Any) -> int:
    """As many as were asked for, else one for each core; on CUDA one for each GPU."""
    kind = "GPU" if run.device.startswith("cuda") else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < 1:
        raise ConfigError(f"The cluster has no {kind} for --device {run.device}.")
    return min(run.workers, there) if run.workers else there


def _compute(
    pictures: Pictures,
    left: list[str],
    told: set[str],
    settings: dict[str, Any],
    workers: int,
    run: PredictRun,
    folder: str,
) -> None:
    """The job itself."""
    import pyarrow
    import ray

    small = {"num_cpus": 0.1}  # reading and writing must find a place while workers hold every core
    if pictures.parquet:
        settings = settings | {"column": pictures.column, "named_by": pictures.named_by}
        columns = [name for name in (pictures.named_by, pictures.column) if name]
        data = ray.data.read_parquet(pictures.parquet, columns=columns, ray_remote_args=small)
    else:
        size = max(min(-(-len(left) // (4 * workers)), BLOCK), 1)
        parts = [left[first : first + size] for first in range(0, len(left), size)]
        data = ray.data.from_arrow([pyarrow.table({"source": part}) for part in parts])
    on = {"num_gpus": 1} if run.device.startswith("cuda") else {"num_cpus": 0.9}
    answered = data.map_batches(
        Worker,
        fn_constructor_args=(settings, frozenset(told) if pictures.parquet else frozenset()),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=max(run.batch_size, 64),
        batch_format="pyarrow",
        **on,
    )
    answered.write_parquet(folder, ray_remote_args=small)


def _is_parquet(item: str) -> bool:
    if item.endswith(".parquet"):
        return True
    return os.path.isdir(item) and any(Path(item).glob("*.parquet"))


def _in_parquet(place: str) -> Pictures:
    """Which columns of a parquet name its pictures and hold them."""
    import pyarrow.dataset as dataset

    where = _absolute(place)
    try:
        table = dataset.dataset(where, format="parquet")
    except Exception as error:
        raise DataError(f"{place} cannot be read as parquet ({_one_line(error)}).") from None
    names = table.schema.names
    held = next((column for column in PICTURES if column in names and _holds(table, column)), "")
    named_by = next((column for column in ADDRESSES if column in names), "")
    if not held and not named_by:
        raise DataError(
            f"{place} has the columns {', '.join(names)}. Pictures are looked for in {', '.join(PICTURES)}, their"
            f" names or addresses in {', '.join(ADDRESSES)}: rename a column."
        )
    if named_by:
        found = [str(name) for name in table.to_table(columns=[named_by]).column(0).to_pylist()]
    else:
        pairs = table.to_table(columns={"path": dataset.field(held, "path")}).column(0)
        found = [str(name) for name in pairs.to_pylist()]
    if len(set(found)) != len(found) or "None" in found:
        raise DataError(
            f"{place} must name each picture once, in the column {named_by or held}; got {len(found)} rows with"
            f" {len(set(found) - {'None'})} names."
        )
    if held:
        return Pictures(names=found, parquet=where, column=held, named_by=named_by)
    return Pictures(names=[_absolute(name) for name in found])


def _holds(table: Any, column: str) -> bool:
    """Whether a column holds encoded pictures, alone or as Hugging Face's pair."""
    import pyarrow.types as types

    kind = table.schema.field(column).type
    if types.is_struct(kind):
        fields = [kind.field(place).name for place in range(kind.num_fields)]
        return "bytes" in fields and "path" in fields
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _counted(folder: str, wanted: set[str]) -> tuple[int, int]:
    """How many of the pictures a folder tells, and how many of those could not be read."""
    rows, errors = 0, 0
    for _, table in _tables(folder, ["source", "error"]):
        for name, error in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
            if name in wanted:
                rows, errors = rows + 1, errors + (error is not None)
    return rows, errors


def _tables(folder: str, columns: list[str], *, remove_torn: bool = False) -> Iterable[tuple[str, Any]]:
    """The parquet files of a folder; `remove_torn` removes those that were cut off while they were written."""
    import pyarrow
    from pyarrow import fs, parquet

    system, root = fs.FileSystem.from_uri(folder) if "://" in folder else (fs.LocalFileSystem(), folder)
    listed = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
    for path in sorted(one.path for one in listed if one.path.endswith(".parquet")):
        try:
            table = parquet.read_table(path, columns=columns, filesystem=system)
        except pyarrow.ArrowInvalid as error:
            if not remove_torn:
                raise DataError(f"{path} cannot be read ({_one_line(error)}); remove it.") from None
            logger.warning("%s was cut off while it was written: its pictures are looked at again", path)
            system.delete_file(path)
            continue
        yield path, table


def _absolute(name: str) -> str:
    return name if "://" in name else os.path.abspath(name)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
