"""`vitrail doctor`: what is installed, what the machine can do, what is broken, and the cure."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import vitrail
from vitrail.runs import DoctorRun

Status = Literal["ok", "note", "broken"]
MATCHED = "Take both at one time from one index: pip install --force-reinstall torch torchvision"
GIGABYTE = 1024**3


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    status: Status
    value: str
    cure: str = ""


def doctor(run: DoctorRun) -> list[Finding]:
    """Every finding, in the order of reading; a check that breaks is itself a finding."""
    found: list[Finding] = []
    for check in (_python, _torch, _torchvision, _packages, _processor, _accelerators, _precision, _threads):
        found += _guarded(check)
    for check in (_memory, _disk, _shared_memory, _decoders, _compiler):
        found += _guarded(check)
    return found


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # broken native libraries raise anything
        name = check.__name__.removeprefix("_").replace("_", " ")
        value = f"cannot be looked at: {type(error).__name__}: {_first_line(error)}"
        return [Finding(name, "broken", value, "Fix what is broken above first.")]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    fit = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if fit else "broken", version, "" if fit else "Use Python 3.11 or newer.")
    yield Finding("vitrail", "ok", f"{vitrail.__version__} in {Path(vitrail.__file__).parent}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding("torch", "broken", _first_line(error), f"Install it again. {MATCHED}")
        return
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    if release[:2] < (2, 11) or release == (2, 13, 0):
        yield Finding(
            "torch", "broken", torch.__version__, "2.11 or newer, and not 2.13.0: pip install -U torch"
        )
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        yield Finding("torch", "ok", f"{torch.__version__} (built for {built})")


def _torchvision() -> Iterator[Finding]:
    try:
        import torch
        from torchvision.ops import nms

        version = importlib.metadata.version("torchvision")
        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except ImportError as error:
        yield Finding("torchvision", "broken", _first_line(error), MATCHED)
    except Exception as error:  # RuntimeError or OSError when its native part was built for another torch
        yield Finding("torchvision", "broken", f"does not fit torch: {_first_line(error)}", MATCHED)
    else:
        yield Finding("torchvision", "ok", f"{version}, its native operators run")


def _packages() -> Iterator[Finding]:
    """What vitrail's own metadata asks for; torch and torchvision are looked at above."""
    try:
        asked = importlib.metadata.requires("vitrail") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "note", "vitrail runs from its source, not installed", "pip install -e .")
        return
    seen = {"torch", "torchvision", "vitrail"}
    for line in asked:
        needed = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if needed is None or needed[0] in seen or (extra and extra[1] == "dev"):
            continue
        seen.add(needed[0])  # some packages stand in several extras
        name, version = needed[0], _version(needed[0])
        if version is not None:
            yield Finding(name, "ok", version)
        elif extra is not None:
            yield Finding(name, "note", "not installed", f"Only if needed: pip install 'vitrail[{extra[1]}]'")
        else:
            yield Finding(name, "broken", "not installed", f"pip install {name}")


def _processor() -> Iterator[Finding]:
    flags = _cpu_flags()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "avx512_vnni", "bf16", "asimd")
    known = " ".join(flag for flag in wanted if flag in flags)
    yield Finding("processor", "ok", f"{_cpu_name()}; {known or 'no vector units named'}")


def _accelerators() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIGABYTE:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        cure = "Install the build of torch for this driver's CUDA version, or renew the driver."
        yield Finding("cuda", "broken", "there is an NVIDIA driver, but torch cannot use it", cure)
    elif not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Finding("accelerator", "ok", "none; everything runs on the CPU")


def _precision() -> Iterator[Finding]:
    import torch

    from vitrail.runtime import choose_device, choose_precision, has_bfloat16

    device = choose_device("auto")
    faster = _matmul_seconds(torch.float32, device) / _matmul_seconds(torch.bfloat16, device)
    units = "has bf16 units" if has_bfloat16(device) else "has no bf16 units"
    chosen = choose_precision("auto", device)
    value = f"auto is {chosen}: {device} {units}; bf16 products run {faster:.2g} times as fast as fp32"
    slow = chosen == "bf16" and faster < 1.0
    yield Finding("precision", "note" if slow else "ok", value, "Try --precision fp32." if slow else "")


def _threads() -> Iterator[Finding]:
    import torch

    allowed = usable_cores()
    threads = torch.get_num_threads()
    value = f"{threads} for {allowed} usable cores (machine: {os.cpu_count()})"
    if threads > allowed:
        cure = f"More threads than cores are slow: export OMP_NUM_THREADS={allowed}"
        yield Finding("threads", "note", value, cure)
    elif threads < allowed and "OMP_NUM_THREADS" in os.environ:
        yield Finding(
            "threads", "note", value, "OMP_NUM_THREADS holds torch back: unset it, unless meant so."
        )
    else:
        yield Finding("threads", "ok", value)


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo().get("MemAvailable", total)
    low = free < 2 * GIGABYTE
    cure = "Close other programs, or use a small --batch-size." if low else ""
    value = f"{free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GiB available"
    yield Finding("memory", "note" if low else "ok", value, cure)


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    low = free < 2 * GIGABYTE
    cure = "Free some space, or write elsewhere with --output." if low else ""
    yield Finding("disk", "note" if low else "ok", f"{free / GIGABYTE:.1f} GiB free in {here}", cure)
    if not os.access(here, os.W_OK):
        yield Finding("folder", "note", f"{here} cannot be written to", "Give --output.")


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    size = shutil.disk_usage(place)
    low = size.free < GIGABYTE // 2
    cure = "Loaders may die: start the container with --shm-size=2g, or use --workers 0." if low else ""
    value = f"{size.free / GIGABYTE:.2f} of {size.total / GIGABYTE:.2f} GiB free"
    yield Finding("/dev/shm", "note" if low else "ok", value, cure)


def _decoders() -> Iterator[Finding]:
    from PIL import features

    missing = [name for name in ("jpg", "webp", "zlib") if not features.check(name)]
    cure = "Install Pillow's own wheel: pip install --force-reinstall pillow" if missing else ""
    value = f"without {', '.join(missing)}" if missing else "JPEG, PNG, WebP"
    yield Finding("image decoders", "broken" if missing else "ok", value, cure)


def _compiler() -> Iterator[Finding]:
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    cure = "" if found else "Only --compile on the CPU needs one: install g++."
    yield Finding("C++ compiler", "ok" if found else "note", found or "none", cure)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def _matmul_seconds(dtype: Any, device: Any) -> float:
    """The best of a few timed products at a size where the arithmetic decides."""
    import torch

    left = torch.randn(512, 768, device=device).to(dtype)
    right = torch.randn(768, 3072, device=device).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        float((left @ right)[0, 0])
        times.append(time.perf_counter() - start)
    return min(times)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _cpuinfo().get("model name", platform.processor() or platform.machine())


def _cpu_flags() -> set[str]:
    words = _cpuinfo()
    return set(words.get("flags", words.get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty on other systems."""
    place = Path("/proc/cpuinfo")
    text = place.read_text(errors="replace").split("\n\n")[0] if place.is_file() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty on other systems."""
    place = Path("/proc/meminfo")
    pairs = (line.split(":") for line in place.read_text().splitlines()) if place.is_file() else ()
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
