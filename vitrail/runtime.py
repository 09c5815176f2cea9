"""Where a run computes: its device, its precision and its processes.

With one process every collective method is the identity, so no caller asks how many there are. Processes are
started by `torchrun`; the collectives are PyTorch's own (gloo on the CPU, NCCL on CUDA). Nothing outside this
file touches `torch.distributed`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from vitrail.errors import ConfigError, TrainingError, UnsupportedError

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]

# A process that has died is noticed at once; this bounds the wait for one that hangs, so that a job says so
# within a minute. Writing a large checkpoint may take longer, so waiting for that has a bound of its own.
PATIENCE = timedelta(seconds=45)
LONG_PATIENCE = timedelta(minutes=30)

VERSIONS = 64
"""Kinds of block that one network may have compiled."""


@dataclass(kw_only=True)
class Runtime:
    """Device, precision and processes of one run; `rank` counts from 0 to `world` - 1."""

    device: torch.device
    precision: Precision = "fp32"
    rank: int = 0
    world: int = 1
    shard: bool = False
    scaler: torch.amp.GradScaler | None = None
    control: Any = None
    """Group of the small numbers on the CPU: losses, flags, counts."""
    slow: Any = None
    """The same group with `LONG_PATIENCE`."""

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.precision == "fp32":
            # float32 means float32; by default torch's convolutions round their inputs to 10 bits on a GPU.
            torch.backends.cudnn.allow_tf32 = False

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def prepare(self, model: nn.Module, blocks: Iterable[nn.Module] = (), compile: bool = False) -> nn.Module:
        """The model placed on the device, compiled block by block, and joined with its copies.

        Blocks are compiled one by one: equal blocks share one compilation, so the start is short, and
        parameter names stay as they are.
        """
        blocks = list(blocks)
        model.to(self.device)
        if compile:
            # Stages of a pyramid, shifted windows and the like are code of their own each; past torch's limit of 8
            # it would run the rest uncompiled.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
            for part in model.modules():
                if hasattr(part, "share_code"):  # nn.block.DropPath
                    cast(Any, part).share_code(self.device)
            for block in blocks or [model]:
                block.compile(dynamic=False)
        if self.world == 1:
            return model
        if self.shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        # convolutions whose maps lie channels last have gradients of other strides, which are copied: no fault
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        return cast(nn.Module, wrapped)

    def autocast(self) -> AbstractContextManager[Any]:
        """The region in which matrix products run in the run's precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module, more: bool) -> Iterator[None]:
        """While `more` batches of the same step follow, gradients stay in their process."""
        if isinstance(model, nn.parallel.DistributedDataParallel) and more:
            with model.no_sync():
                yield
            return
        if self.shard and self.world > 1:
            cast(Any, model).set_requires_gradient_sync(not more)
        yield

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over processes, number by number."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return self._reduce([float(flag)], distributed.ReduceOp.MAX)[0] > 0

    def sum_tensor(self, values: Tensor) -> Tensor:
        """The sum of a tensor over processes, on its own device."""
        if self.world == 1:
            return values
        with self.watch("adding up a tensor"):
            there = values.detach().cpu().clone()
            distributed.all_reduce(there, group=self.control)
        return there.to(values.device)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of a tensor over processes, in its place and by the device's own way: for what a network computes."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits for the other processes, the main one may be writing a checkpoint."""
        if self.world > 1:
            with self.watch("waiting for the others"):
                distributed.all_reduce(torch.zeros(1), group=self.slow)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies on the CPU in the main process, and nothing elsewhere.

        Sharded tensors are put together one at a time, so no accelerator ever holds the whole model.
        Every process must call this.
        """
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            if self.main:
                whole[name] = full.detach().cpu().contiguous()
        return whole

    def place_like(self, whole: Tensor, like: Tensor) -> Tensor:
        """A whole tensor brought to the device, type and sharding of another one."""
        placed = whole.to(device=like.device, dtype=like.dtype)
        if not _is_sharded(like):
            return placed
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = cast(DTensor, like)
        return distribute_tensor(placed, sharded.device_mesh, sharded.placements)

    def number(self, value: Tensor) -> float:
        """A scalar tensor as a number, whether sharded or not."""
        full = value.full_tensor() if _is_sharded(value) else value  # type: ignore[attr-defined]
        return float(full.item())

    @contextlib.contextmanager
    def watch(self, doing: str) -> Iterator[None]:
        """Turns the loss of another process, met inside, into a TrainingError that says so."""
        try:
            yield
        except RuntimeError as error:
            if self.world > 1 and _is_lost_peer(error):
                raise TrainingError(
                    f"Process {self.rank} of {self.world} lost another process while {doing}: it died, or did"
                    f" not answer in time. Look at that process's log; the"
                    " same command goes on from the last checkpoint, with any number of processes."
                    f" ({str(error).splitlines()[0][:200]})"
                ) from error
            raise

    def close(self) -> None:
        """Leaves the group of processes."""
        if self.world > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        if self.world == 1:
            return [float(value) for value in values]
        numbers = torch.tensor(list(values), dtype=torch.float64)
        with self.watch("waiting for the others"):
            distributed.all_reduce(numbers, op=how, group=self.control)
        return [float(value) for value in numbers.tolist()]


def open_runtime(
    device: str = "auto", precision: str = "auto", shard: bool = False, deterministic: bool = False
) -> Runtime:
    """The runtime of this process; joins the group when `torchrun` started it.

    `deterministic` makes torch take only operations whose results repeat bit for bit. Raises ConfigError for
    a device or precision that this machine has not.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    chosen = choose_precision(precision, place)
    if shard and world == 1:
        raise UnsupportedError("Sharding needs more than one process; start the run with torchrun.")
    if deterministic:
        # cuBLAS reads this when CUDA starts; nothing before this line has touched the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    control = slow = None
    if world > 1:
        if place.type == "cuda":
            torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        if not distributed.is_initialized():
            distributed.init_process_group(backend, timeout=PATIENCE)
        control = distributed.new_group(backend="gloo", timeout=PATIENCE)
        slow = distributed.new_group(backend="gloo", timeout=LONG_PATIENCE)
    scaler = torch.amp.GradScaler(place.type) if chosen == "fp16" else None
    return Runtime(
        device=place,
        precision=chosen,
        rank=rank,
        world=world,
        shard=shard,
        scaler=scaler,
        control=control,
        slow=slow,
    )


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; `auto` takes CUDA, then Apple's GPU, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}.") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ConfigError(
                f"device {name}: torch sees {count} CUDA devices here. Use --device cpu or auto."
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps: torch sees no Apple GPU here. Use --device cpu or auto.")
    return device


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of a name; `auto` takes bf16 where the chip computes in it, else fp32."""
    if name == "auto":
        return "bf16" if has_bfloat16(device) else "fp32"
    if name not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"precision must be auto, fp32, bf16 or fp16, not {name!r}.")
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision fp16 needs CUDA, and this run is on {device.type}. Use fp32 or bf16.")
    if name == "bf16" and not has_bfloat16(device):
        logger.warning("%s has no bf16 units: bf16 will run, and be slower than fp32.", device)
    return cast(Precision, name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the chip has units for bf16 products; on others torch imitates them, slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        if known:
            return any(bool(known.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
    return False


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_lost_peer(error: RuntimeError) -> bool:
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return any(
        sign in text for sign in ("gloo", "nccl", "connection closed", "connection reset", "timed out")
    )
