"""Tensors out of files, and into them; reading never executes anything.

    .safetensors                 the format of choice: a header and bytes
    .npz                         numpy arrays, read here from the zip directory, without numpy's pickles
    .pth .pt .bin .tar .ckpt     torch's pickles, only by its weights-only reader; there is no other way in

Sizes are checked before memory is taken: an archive that unpacks to far more than it holds is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from vitrail.disk import flush_folder
from vitrail.errors import WeightsError

logger = logging.getLogger(__name__)

PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *PICKLES)

IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json")
"""What a model folder's weights may be called, best first; then torch's pickles."""
PICKLES_IN_FOLDERS = ("pytorch_model.bin", "pytorch_model.bin.index.json")

CONTAINERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "network", "params", "weights")
"""Keys under which training scripts put the weights among other things."""
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "module_ema")
"""Keys of averaged weights: taken when asked for, or when there is nothing else."""

FREE = 1 << 30
"""Bytes that any archive may unpack to."""
RATIO = 20
"""How many times its own size a larger archive may unpack to; weights hardly compress."""

PARTIAL = ".partial"
"""How temporary names end."""

JSON_LIMIT = 64 << 20
"""Largest config or index that is read, in bytes."""


def read_tensors(path: str | Path, *, averaged: bool = False, finite: bool = False) -> dict[str, Tensor]:
    """All tensors of a weight file, or of a folder that holds one, by name, on the CPU, in the file's dtype.

    Args:
        path: a file with one of SUFFIXES, or a folder of vitrail, timm or transformers.
        averaged: take averaged weights (EMA) where a training checkpoint holds both.
        finite: refuse NaN and infinity.

    Raises:
        WeightsError: not a file, of no known kind, torn, too large once unpacked, holding more than tensors, or
            (with `finite`) holding numbers that are not finite.
    """
    place = Path(path)
    found = weight_files(place) if place.is_dir() else [place]
    tensors: dict[str, Tensor] = {}
    for file in found:
        part = _read_file(file, averaged)
        twice = tensors.keys() & part.keys()
        if twice:
            raise WeightsError(
                f"{place}: {min(twice)} is in two files; the folder mixes two saves, save it again."
            )
        tensors |= part
    if not tensors:
        raise WeightsError(f"{place} holds no tensors.")
    if finite:
        check_finite(tensors, str(place))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, several where an index splits them.

    Raises:
        WeightsError: there is none, or the index names a file outside the folder.
    """
    for name in (*IN_FOLDERS, *PICKLES_IN_FOLDERS):
        place = folder / name
        if not place.exists():
            continue
        if not name.endswith(".json"):
            return [place]
        names = read_json(place).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise WeightsError(f"{place} is no index of weight files: it has no weight_map.")
        for shard in names.values():
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise WeightsError(f"{place} names {shard!r}; it may name files in its own folder only.")
        return [folder / shard for shard in sorted(set(names.values()))]
    others = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1:
        return others
    several = f"; it holds {', '.join(file.name for file in others[:5])}: name one of them" if others else ""
    raise WeightsError(f"{folder} holds no {' or '.join((*IN_FOLDERS, *PICKLES_IN_FOLDERS))}{several}.")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises WeightsError when it is none, or larger than JSON_LIMIT."""
    _check_regular(path)
    if path.stat().st_size > JSON_LIMIT:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes, more than {JSON_LIMIT} for a JSON file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def hub_cure(path: str | Path) -> str:
    """How to get what a name on a model hub or an address means, as the end of a message; empty for other paths."""
    place = Path(path)
    address = bool(re.match(r"[a-z][a-z0-9+-]+:", str(path)))
    named = not place.is_absolute() and len(place.parts) == 2 and not place.parent.exists()
    if not (address or named):
        return ""
    return (
        " Nothing is fetched by name or address: download it first (`hf download OWNER/NAME --local-dir FOLDER` for"
        " the Hugging Face Hub) and give the path."
    )


def sha256(path: str | Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError that names the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{where}: {name} {tuple(tensor.shape)} holds {bad} numbers that are not finite; "
                "the weights are broken, take an earlier checkpoint."
            )


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> str:
    """Write .safetensors or .npz in one step (temporary name, flush to disk, rename); gives the SHA-256.

    Raises:
        WeightsError: another suffix; vitrail writes no pickles.
    """
    place = Path(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if place.suffix == ".safetensors":
        from safetensors.torch import save_file

        return replace_file(place, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}))
    if place.suffix == ".npz":
        arrays = {name: _array(tensor) for name, tensor in plain.items()}
        return replace_file(place, lambda temporary: _save_npz(temporary, arrays))
    raise WeightsError(
        f"Weights are written as .safetensors or .npz, got {place.name!r} (pickles are never written)."
    )


def replace_file(path: Path, write: Callable[[Path], object]) -> str:
    """Let `write` make a file under a temporary name beside `path`, bring it to disk, rename it; its SHA-256."""
    temporary = staged(path, write)
    digest = sha256(temporary)
    os.replace(temporary, path)
    flush_folder(path.parent)
    return digest


def staged(path: Path, write: Callable[[Path], object]) -> Path:
    """A file that `write` made beside `path` under a temporary name, brought to disk; nothing is left on failure."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors puts a file in its place that nobody else may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise WeightsError(
                f"{path} cannot be written: {error}. What was there before is untouched."
            ) from error
        raise
    return temporary


def sweep(path: Path) -> None:
    """Remove what a killed process left beside `path` under temporary names."""
    for stale in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            stale.unlink()


def _read_file(path: Path, averaged: bool) -> dict[str, Tensor]:
    _check_regular(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in PICKLES:
        return _read_pickle(path, averaged)
    raise WeightsError(f"{path} is no weight file: its name must end in {', '.join(SUFFIXES)}.")


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise WeightsError(f"{path} does not exist.{hub_cure(path)}")
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{path} is no whole safetensors file: {error}. Copy or download it again."
        ) from error
    return tensors


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_expanded(path, archive)
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise WeightsError(f"{path} holds two arrays of one name.")
            return {name: _read_npy(archive.open(member), member, path) for name, member in members.items()}
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise WeightsError(f"{path} is no whole .npz file: {error}. Copy or download it again.") from error


def _read_npy(stream: IO[bytes], member: zipfile.ZipInfo, path: Path) -> Tensor:
    """One array of an archive; its header must agree with its size before anything is read."""
    with stream:
        try:
            version = np.lib.format.read_magic(stream)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in readers:
                raise ValueError(f"array format {version}")
            shape, fortran, dtype = readers[version](stream)
        except ValueError as error:
            raise WeightsError(f"{path}: {member.filename} is no numpy array ({error}).") from None
        if dtype.hasobject:
            raise WeightsError(
                f"{path}: {member.filename} holds Python objects (a pickle), which is never read."
            )
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != member.file_size - stream.tell():
            raise WeightsError(
                f"{path}: {member.filename} says {shape} {dtype}, which is not the size of what follows."
            )
        array = np.frombuffer(bytearray(stream.read()), dtype).reshape(shape, order="F" if fortran else "C")
    return _tensor(array, member.filename, path)


def _tensor(array: np.ndarray[Any, Any], name: str, path: Path) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy keeps JAX's bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=False))
    except TypeError:
        raise WeightsError(f"{path}: {name} holds {array.dtype}, which is no tensor.") from None


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


def _save_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed, so equal weights give equal files
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _check_expanded(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that unpacks to far more than it holds."""
    packed = path.stat().st_size
    expanded = sum(member.file_size for member in archive.infolist())
    if expanded > max(FREE, RATIO * packed):
        raise WeightsError(
            f"{path} has {packed} bytes and would unpack to {expanded}: more than {RATIO} times its size, "
            "which no weight file does."
        )


def _read_pickle(path: Path, averaged: bool) -> dict[str, Tensor]:
    """A torch pickle by the weights-only reader, which knows tensors, containers and numbers, and no functions."""
    import argparse

    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                _check_expanded(path, archive)
        # training scripts leave their arguments beside the weights: names and values, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except WeightsError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise WeightsError(_refusal(path, error)) from None
    except Exception as error:  # a forged pickle may make the reader itself stumble in any way
        raise WeightsError(f"{path} is no whole torch file ({type(error).__name__}: {error}).") from None
    return _unwrapped(content, path, averaged)


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found is not None:
        return (
            f"{path} holds more than tensors: it asks for {found[1]}, which is never executed. If you trust where it"
            " comes from, save its state dict alone with the program that made it, best as .safetensors."
        )
    unread = re.search(r"Unsupported \w+ \S+", text)
    if unread is not None:
        return (
            f"{path} is a pickle of a kind that torch's weights-only reader does not read ({unread[0]}), and there is"
            " no other way in. If you trust where it comes from, save its state dict again with torch.save and no"
            " pickle_protocol, best as .safetensors."
        )
    # Before these words torch advises to open the file unsafely.
    _, _, said = text.rpartition("WeightsUnpickler error:")
    said = said.strip()
    reason = next((line for line in said.splitlines() if "Error" in line), said.partition("\n")[0])
    return f"{path} is no whole torch file ({reason.strip()[:200] or type(error).__name__})."


def _unwrapped(content: Any, path: Path, averaged: bool) -> dict[str, Tensor]:
    """The state dict inside what a training script saved."""
    order = (*AVERAGED, *CONTAINERS) if averaged else (*CONTAINERS, *AVERAGED)
    for _ in range(4):
        if not isinstance(content, Mapping):
            raise WeightsError(f"{path} holds a {type(content).__name__}, not tensors by name.")
        inside = [key for key in order if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        inner = inside[0]
        averages = [key for key in AVERAGED if key in inside and key != inner]
        if averages:
            logger.warning(
                "%s holds %s and, averaged over training, %s; the first is taken (convert --averaged takes the other)",
                path, inner, ", ".join(averages),
            )  # fmt: skip
        content = content[inner]
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        logger.info("%s also holds %s, which are no tensors", path, ", ".join(sorted(others)[:8]))
    for name, tensor in tensors.items():
        _check_stored(name, tensor, path)
    return tensors


def _check_stored(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse tensors that claim more numbers than their file holds, and kinds that are not plain."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsError(f"{path}: {name} is sparse or quantised; save it as a plain tensor.")
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 0):
        raise WeightsError(f"{path}: {name} says {tuple(tensor.shape)}, more than the file holds.")
