"""Which parameter learns how: groups, optimisers, and their state by parameter name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError, UnsupportedError, WeightsError
from vitrail.runtime import Runtime
from vitrail.train.muon import Muon

logger = logging.getLogger(__name__)

Kind = Literal["adamw", "sgd", "muon"]


class Layered(Protocol):
    """What optimisation asks of a network: the depth of a parameter, and what never decays."""

    depth: int

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def depth_of(self, name: str) -> int:
        """0 for what comes before the blocks, 1..depth for the blocks, depth + 1 for the head."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, besides those of rank 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How to optimise. `lr` is the peak of the head's rate; each block before it has `layer_decay` times the next
    one's, and the whole backbone `backbone_lr` times what it had."""

    kind: Kind = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    backbone_lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be a number above 0, not {self.lr}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay must be 0 or more, not {self.weight_decay}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in 0..1, 1 excluded, not {self.momentum}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be two numbers in 0..1, 1 excluded, not {self.betas}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay must be above 0 and at most 1, not {self.layer_decay}.")
        if not 0 < self.backbone_lr < float("inf"):
            raise ConfigError(
                f"backbone_lr must be above 0, not {self.backbone_lr}; --freeze backbone for one that never learns."
            )


def decays(name: str, parameter: Tensor, excluded: set[str]) -> bool:
    """Whether weight decay touches a parameter: a matrix or kernel, and no position or token."""
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in excluded


def is_hidden_matrix(model: Layered, name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: the matrices inside the blocks."""
    return (
        parameter.ndim == 2
        and 1 <= model.depth_of(name) <= model.depth
        and decays(name, parameter, model.no_weight_decay())
    )


def parameter_groups(
    model: Layered, settings: Hyperparameters, names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Groups of named trainable parameters that share learning rate and weight decay.

    Every group states `peak`, the highest learning rate that the schedule gives it.
    """
    excluded = model.no_weight_decay()
    wanted = None if names is None else set(names)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (wanted is not None and name not in wanted):
            continue
        decay = settings.weight_decay if decays(name, parameter, excluded) else 0.0
        peak = settings.lr * settings.layer_decay ** (model.depth + 1 - model.depth_of(name))
        if name.startswith("backbone."):
            peak *= settings.backbone_lr
        group = groups.setdefault(
            (peak, decay), {"params": [], "lr": peak, "peak": peak, "weight_decay": decay}
        )
        group["params"].append((name, parameter))
    return list(groups.values())


class Optimiser:
    """One or two torch optimisers that step together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer], runtime: Runtime) -> None:
        self.parts = list(parts)
        self.runtime = runtime
        self.parameters = [parameter for _, parameter in self._named()]

    def set_rate(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor

    @property
    def rate(self) -> float:
        """The highest learning rate now in force."""
        return max(float(group["lr"]) for part in self.parts for group in part.param_groups)

    def clip(self, limit: float) -> float:
        """The norm of all gradients, which are then scaled down to `limit` (0 = left as they are)."""
        if self.runtime.scaler is not None:
            for part in self.parts:
                self.runtime.scaler.unscale_(part)
        norm = nn.utils.clip_grad_norm_(self.parameters, limit if limit > 0 else float("inf"))
        return self.runtime.number(norm)

    def step(self) -> None:
        """Takes one step; gradients are left."""
        for part in self.parts:
            if self.runtime.scaler is not None:
                self.runtime.scaler.step(part)
            else:
                part.step()

    def zero(self) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The optimisers' memory, as `NAME/KEY` for every parameter."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            for name, parameter in _named_of(part):
                for key, value in part.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        found[f"{name}/{key}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts a memory back that `state` gave. Raises WeightsError when it is another network's."""
        left = dict(state)
        for part in self.parts:
            for name, parameter in _named_of(part):
                for key in [key for key in left if key.rpartition("/")[0] == name]:
                    value, kind = left.pop(key), key.rpartition("/")[2]
                    like = (
                        torch.empty((), device=_step_device(part, parameter)) if kind == "step" else parameter
                    )
                    if kind != "step" and value.shape != parameter.shape:
                        raise WeightsError(
                            f"The optimiser's {key} is {list(value.shape)}, its parameter"
                            f" {list(parameter.shape)}."
                        )
                    part.state[parameter][kind] = self.runtime.place_like(value, like)
        if left:
            raise WeightsError(f"The optimiser has no parameter for {', '.join(sorted(left)[:3])}.")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            yield from _named_of(part)


def build_optimiser(model: Layered, settings: Hyperparameters, runtime: Runtime) -> Optimiser:
    """The optimiser of such settings over the trainable parameters of a network already in its place."""
    if not any(parameter.requires_grad for _, parameter in model.named_parameters()):
        raise ConfigError(
            "There is nothing to train: every parameter is frozen, and the network has no head."
        )
    if settings.kind == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        groups = parameter_groups(model, settings)
        return Optimiser(
            [torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)], runtime
        )
    if settings.kind == "adamw":
        return Optimiser([_adamw(parameter_groups(model, settings), settings, runtime)], runtime)
    if runtime.shard and runtime.world > 1:
        raise UnsupportedError("Muon needs whole matrices, and --shard splits them. Use --opt adamw.")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    hidden = [name for name, parameter in named if is_hidden_matrix(model, name, parameter)]
    rest = [name for name, _ in named if name not in set(hidden)]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        dtype = torch.float32 if runtime.precision == "fp32" else torch.bfloat16
        groups = parameter_groups(model, settings, hidden)
        momentum = {"momentum": settings.momentum, "nesterov": settings.nesterov}
        parts.append(Muon(groups, lr=settings.lr, dtype=dtype, **cast(Any, momentum)))
    if rest:
        parts.append(_adamw(parameter_groups(model, settings, rest), settings, runtime))
    return Optimiser(parts, runtime)


def _adamw(
    groups: list[dict[str, Any]], settings: Hyperparameters, runtime: Runtime
) -> torch.optim.Optimizer:
    fused = runtime.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)


def _named_of(part: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in part.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _step_device(part: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    # A fused optimiser counts its steps on the device, the others on the CPU.
    return parameter.device if part.defaults.get("fused") else torch.device("cpu")
