"""The table of methods: what each needs of a network, what it costs, and one call for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ConfigError, UnsupportedError, suggestion
from vitrail.explain.attention import blocks_of, mixers_of
from vitrail.explain.gates import gated, gates_of
from vitrail.explain.gradients import gradcam, integrated_gradients
from vitrail.explain.heat import Heat
from vitrail.explain.occlusion import occlusion
from vitrail.explain.questions import Asked, query_attention, question_gradcam, reader_of
from vitrail.explain.rollout import attention, relevance, rollout
from vitrail.models.registry import name_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a method may be told; each takes what concerns it."""

    layer: int | None = None
    """Mixer (attention) or block (gradcam), from 0, or from the end; by default the last that means something."""
    head: int | None = None
    """Head of attention; by default the mean."""
    token: str = ""
    """Prefix token whose attention is shown: class, distillation or a number; by default those the head reads."""
    steps: int = 32
    """Steps of integrated gradients."""
    grid: tuple[int, int] = (14, 14)
    """Regions of occlusion, rows and columns."""


Run = Callable[[nn.Module, Tensor, Sequence[int] | Tensor, Options], Heat]


class Method(NamedTuple):
    """One way to explain."""

    run: Run
    class_specific: bool
    """Whether the map is about one class; if not, it must not be read as the reason for it."""
    takes: frozenset[str]
    """Names of the options that it takes."""
    lacking: Callable[[nn.Module], str]
    """What a network lacks for it; empty where it is defined."""
    forwards: Callable[[Options], float]
    """About how many forward passes an image costs."""


def _no_attention(network: nn.Module) -> str:
    if isinstance(network, Asked):
        return "" if reader_of(network) is not None else "no query of it looks at one whole map"
    if mixers_of(network) or gates_of(network):
        return ""
    return "it has no attention that can be written down, and no gates"


def _attention(network: nn.Module, images: Tensor, targets: Sequence[int] | Tensor, options: Options) -> Heat:
    """Weights where there are some, else what the channel gates let through. Raises ConfigError for idle options."""
    if isinstance(network, Asked):
        _refuse(
            options,
            ("layer", "head", "token"),
            "For boxes attention is that of the box's query, mean over heads",
        )
        return query_attention(network, images, targets)
    if mixers_of(network):
        return attention(network, images, options.layer, options.head, options.token)
    _refuse(options, ("head", "token"), "This network has channel gates, which have neither heads nor tokens")
    return gated(network, images, options.layer)


def _refuse(options: Options, names: Sequence[str], why: str) -> None:
    """Raise ConfigError for an option that was given and would do nothing."""
    given = [name for name in names if getattr(options, name) != getattr(Options(), name)]
    if given:
        raise ConfigError(f"{why}: leave {' and '.join(given)} out.")


def _gradcam(network: nn.Module, images: Tensor, targets: Sequence[int] | Tensor, options: Options) -> Heat:
    if not isinstance(network, Asked):
        return gradcam(network, images, targets, options.layer)
    if options.layer is not None:
        raise ConfigError("For boxes and masks gradcam takes no layer: it reads all maps of the backbone.")
    return question_gradcam(network, images, targets)


def _no_chain(network: nn.Module) -> str:
    """Rollout and relevance follow tokens through every block: each must say how it mixes them."""
    if isinstance(network, Asked):
        return "its boxes or masks hang on more than one chain of tokens"
    blocks = blocks_of(network)
    if not blocks:
        return "it is not made of blocks whose attention could be followed"
    mixers = mixers_of(network)
    silent = [
        name
        for name, block in blocks.items()
        if not any(mixer.startswith(name + ".") for mixer in mixers) and not _token_by_token(block)
    ]
    return f"{silent[0]} does not say how it mixes tokens" if silent else ""


def _token_by_token(block: nn.Module) -> bool:
    """Whether a block works on every token alone, so that no token learns of another."""
    alone = (nn.Linear, nn.LayerNorm, nn.GELU, nn.ReLU, nn.Dropout, nn.Identity)
    return all(isinstance(part, alone) for part in block.modules() if not list(part.children()))


def _nothing(network: nn.Module) -> str:
    return ""


METHODS: dict[str, Method] = {
    # name              function, about a class?, options, what it needs, cost
    "attention": Method(
        _attention,
        False, frozenset({"layer", "head", "token"}), _no_attention, lambda to: 1.0,
    ),
    "rollout": Method(
        lambda net, images, targets, to: rollout(net, images, to.token),
        False, frozenset({"token"}), _no_chain, lambda to: 1.1,
    ),
    "relevance": Method(
        lambda net, images, targets, to: relevance(net, images, targets, to.token),
        True, frozenset({"token"}), _no_chain, lambda to: 2.7,
    ),
    "gradcam": Method(
        _gradcam,
        True, frozenset({"layer"}), _nothing, lambda to: 1.2,
    ),
    "integrated_gradients": Method(
        lambda net, images, targets, to: integrated_gradients(net, images, targets, steps=to.steps),
        True, frozenset({"steps"}), _nothing, lambda to: 3.0 * to.steps,
    ),
    "occlusion": Method(
        lambda net, images, targets, to: occlusion(net, images, targets, to.grid),
        True, frozenset({"grid"}), _nothing, lambda to: 1.0 + to.grid[0] * to.grid[1],
    ),
}  # fmt: skip


def methods_for(network: nn.Module) -> tuple[str, ...]:
    """Names of the methods that are defined for a network, cheap ones first."""
    return tuple(name for name, method in METHODS.items() if not method.lacking(network))


def default_method(network: nn.Module) -> str:
    """Relevance where tokens can be followed through all blocks, else Grad-CAM."""
    return "gradcam" if METHODS["relevance"].lacking(network) else "relevance"


def choose(network: nn.Module, method: str) -> str:
    """The method that a name means ("auto" too).

    Raises ConfigError for an unknown name, UnsupportedError where the method is not defined for the network, with
    those that are.
    """
    if method == "auto":
        method = default_method(network)
    if method not in METHODS:
        names = ["auto", *METHODS]
        raise ConfigError(
            f"method must be one of {', '.join(names)}; got {method!r}.{suggestion(method, names)}"
        )
    lacking = METHODS[method].lacking(network)
    if lacking:
        raise UnsupportedError(
            f"{method} is not defined for {name_of(network)}: {lacking}. These are: {', '.join(methods_for(network))}."
        )
    return method


def check_options(methods: Sequence[str], options: Options) -> None:
    """Raise ConfigError for an option that was given and that none of the methods takes."""
    default = Options()
    for field in ("layer", "head", "token", "steps"):
        given = getattr(options, field) != getattr(default, field)
        if given and not any(field in METHODS[method].takes for method in methods):
            takers = ", ".join(name for name, other in METHODS.items() if field in other.takes)
            verb = "takes" if len(methods) == 1 else "take"
            raise ConfigError(f"{' and '.join(methods)} {verb} no {field}; {field} goes with: {takers}.")


def heat_of(
    network: nn.Module,
    images: Float[Tensor, "B C I J"],
    targets: Sequence[int] | Tensor,
    method: str,
    options: Options,
) -> Heat:
    """One method's maps for a batch of normalised images and one class an image."""
    return METHODS[choose(network, method)].run(network, images, targets, options)
