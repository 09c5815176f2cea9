"""What attention says: one layer's as it is, rollout through all, and relevance weighted by gradients.

raw         the weights of one layer, from the token that the head reads.
rollout     Abnar and Zuidema 2020 (2005.00928), section 3: R = Π (A + 1) / 2 with A the mean over heads. It does
            not know a class.
relevance   Chefer et al. 2021 (2103.15679), section 3.1: R ← R + Ā R with Ā the mean over heads of the positive
            part of ∂y/∂A ∘ A. Attention and gradient alone, no layer-wise relevance propagation.

Both products are read from the last token backwards: the rows that the head reads are carried through layer
after layer, so that no product of two N x N matrices is ever taken. Between stages the rows go through what the
entry made its cells of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.explain.attention import Look, Move, Pass, chosen, explicit, mixers_of
from vitrail.explain.heat import Heat
from vitrail.explain.still import held_still
from vitrail.nn.heads import DistilledHead


@dataclass(kw_only=True)
class Rows:
    """How much some readers hang on each token: Q readers, over P prefix tokens and the cells of a map."""

    prefix: Float[Tensor, "B Q P"]
    cells: Float[Tensor, "B Q h w"]

    @property
    def tokens(self) -> Float[Tensor, "B Q N"]:
        """Prefix and cells in the order of the tokens, N = P + h w."""
        return torch.cat([self.prefix, self.cells.flatten(2)], dim=2)


def reading(network: nn.Module, token: str = "") -> Callable[[int, int], Tensor]:
    """Which of the last tokens the head reads: a function of their prefix and cells that gives shares `[N]`.

    `token` asks for one prefix token by name or number ("class", "distillation", "2").
    """
    head: Any = getattr(network, "head", None)
    pooling = "both" if isinstance(head, DistilledHead) else getattr(head, "pooling", "mean")

    def shares(prefix: int, cells: int) -> Tensor:
        rows = torch.zeros(prefix + cells)
        if token:
            rows[token_number(token, prefix)] = 1
        elif pooling == "both" and prefix > 1:
            rows[:2] = 0.5
        elif pooling in ("token", "both") and prefix:
            rows[0] = 1
        elif pooling == "flatten":
            rows[:] = 1 / (prefix + cells)
        else:
            rows[prefix:] = 1 / cells
        return rows

    return shares


def reads_prefix(network: nn.Module) -> bool:
    """Whether the head reads prefix tokens alone, where there are any."""
    return bool(reading(network)(2, 1)[:2].sum() == 1)


def token_number(token: str, prefix: int) -> int:
    """The number of a prefix token called by name or number. Raises ConfigError with those that there are."""
    names = {"class": 0, "distillation": 1, **{str(number): number for number in range(prefix)}}
    number = names.get(token, prefix)
    if number >= prefix:
        there = ", ".join(name for name, place in names.items() if place < prefix)
        if not there:
            raise ConfigError(f"There are no tokens before the patches here: leave token out; got {token!r}.")
        raise ConfigError(f"token must be one of the tokens before the patches ({there}); got {token!r}.")
    return number


def looked_at(rows: Rows, look: Look, weights: Tensor) -> Rows:
    """What the readers get through one layer's weights: rows · weights, laid out over prefix and cells.

    `weights` are `[B, N, M]`, or `[B, W, L, L]` where the look has the members of its windows; a look with a factor
    gets them times it.
    """
    got = _through_windows(rows, look, weights) if look.members is not None else _through(rows, weights)
    if look.factor is not None:
        got = got @ look.factor.transpose(1, 2)
    keys = look.keys
    prefix = got.new_zeros(rows.prefix.shape)
    prefix[:, :, : keys.prefix] = got[:, :, : keys.prefix]
    cells = got[:, :, keys.prefix :].unflatten(2, tuple(keys.grid))  # [B, Q, m, m]
    return Rows(prefix=prefix, cells=keys.rows.to(cells).t() @ cells @ keys.columns.to(cells))


def _through(rows: Rows, weights: Float[Tensor, "B N M"]) -> Float[Tensor, "B Q M"]:
    return rows.tokens[:, :, : weights.shape[1]] @ weights


def _through_windows(rows: Rows, look: Look, weights: Float[Tensor, "B W L L"]) -> Float[Tensor, "B Q M"]:
    members, keys = look.members, look.keys
    assert members is not None
    padded = keys.rows.to(rows.cells) @ rows.cells @ keys.columns.to(rows.cells).t()  # [B, Q, m, m]
    inside = padded.flatten(2)[:, :, members].transpose(1, 2) @ weights  # [B, W, Q, L]
    got = torch.zeros_like(padded.flatten(2))
    got[:, :, members.flatten()] = inside.transpose(1, 2).flatten(2)
    return got


def moved(rows: Rows, move: Move) -> Rows:
    """The readers' rows over the tokens before an entry; what lies on tokens that came in with it is left out."""
    cells = move.rows.matrix.to(rows.cells).t() @ rows.cells @ move.columns.matrix.to(rows.cells)
    return Rows(prefix=rows.prefix[:, :, : move.prefix_before], cells=cells)


def carried_back(found: Pass, start: Rows, through: Callable[[Look], Tensor], share: float) -> Rows:
    """Readers' rows from the last tokens to the tokens of the first stage.

    Every block turns rows r into share · (r + the mean over its mixers of r · through(mixer)); tokens that a mixer
    does not renew (the patches in class attention) keep their rows whole. A share of 1 adds up relevance, where
    mixers side by side are summed; 1/2 keeps sums of rows (rollout).
    """
    rows = start
    for group in _backwards(found):
        if isinstance(group, Move):
            if group.name != found.moves[0].name:
                rows = moved(rows, group)
            continue
        renewed = rows.tokens.shape[2]
        gains = []
        for look in group:
            weights = through(look)
            if look.members is None:
                renewed = min(renewed, weights.shape[1])
            gains.append(looked_at(rows, look, weights))
        weight = share / len(group) if share < 1 else 1.0
        kept = torch.ones_like(rows.tokens)
        kept[:, :, :renewed] = share
        remaining = rows.tokens * kept
        prefix = remaining[:, :, : rows.prefix.shape[2]] + weight * sum(gain.prefix for gain in gains)
        cells = remaining[:, :, rows.prefix.shape[2] :].view_as(rows.cells) + weight * sum(
            gain.cells for gain in gains
        )
        rows = Rows(prefix=prefix, cells=cells)
    return rows


def _backwards(found: Pass) -> list[Move | list[Look]]:
    """Events from the last to the first, the mixers of one block together."""
    groups: list[Move | list[Look]] = []
    for event in reversed(found.events):
        if isinstance(event, Move):
            groups.append(event)
        elif groups and isinstance(groups[-1], list) and groups[-1][0].block == event.block:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def start_rows(found: Pass, shares: Callable[[int, int], Tensor], like: Tensor) -> Rows:
    """One reader at the last tokens, for every image of a batch."""
    last = found.moves[-1]
    row = shares(last.prefix_after, last.after.size).to(like).expand(like.shape[0], 1, -1)  # [B, 1, N]
    return Rows(
        prefix=row[:, :, : last.prefix_after],
        cells=row[:, :, last.prefix_after :].unflatten(2, tuple(last.after)),
    )


def attention(
    network: nn.Module,
    images: Float[Tensor, "B C I J"],
    layer: int | None = None,
    head: int | None = None,
    token: str = "",
) -> Heat:
    """One layer's weights as they are: from the token that the head reads, or the mean over all queries.

    `layer` counts all mixers from 0, or from the end (by default the last); without `head`, the mean over heads.
    """
    name = chosen(list(mixers_of(network)), -1 if layer is None else layer, "layer")
    with held_still(network), torch.no_grad(), explicit(network, only=[name]) as found:
        network(images)
    look = found.looks[0]
    heads = look.weights.shape[1]
    if head is not None and not 0 <= head < heads:
        raise ConfigError(f"{look.block} has heads 0 to {heads - 1}; got {head}.")
    if token and not look.prefix:
        raise ConfigError(
            f"{look.block} has no tokens before the patches, and token asks for one of them; got {token!r}. Leave token"
            " out for the mean over all queries, or take another layer."
        )
    weights = look.weights.mean(dim=1) if head is None else look.weights[:, head]  # [B, N, M]
    row = images.new_zeros(look.prefix + look.grid.size)
    if look.prefix:
        row[: look.prefix] = reading(network, token)(look.prefix, look.grid.size)[: look.prefix].to(row)
    if row.sum() == 0:
        row[look.prefix :] = 1 / look.grid.size
    whose = "mean over all queries" if row[: look.prefix].sum() == 0 else f"{token or 'read'} token"
    row = row.expand(images.shape[0], 1, -1)
    start = Rows(
        prefix=row[:, :, : look.prefix], cells=row[:, :, look.prefix :].unflatten(2, tuple(look.grid))
    )
    cells = looked_at(start, look, weights).cells[:, 0]
    # In some non-local blocks the weights of a row do not sum to 1.
    summing = bool(torch.allclose(weights.sum(dim=2), torch.ones(()).to(weights), atol=1e-3))
    return Heat(
        values=cells.float().cpu(),
        placement=look.placement,
        units="share of attention",
        where=f"{look.block}, {'mean over heads' if head is None else f'head {head}'}, {whose}",
        elsewhere=(1 - cells.sum(dim=(1, 2))).float().cpu() if summing else None,
    )


def rollout(network: nn.Module, images: Float[Tensor, "B C I J"], token: str = "") -> Heat:
    """Attention rollout to the token that the head reads; shares of one, `elsewhere` on prefix and padding."""
    with held_still(network), torch.no_grad(), explicit(network, mean=True, local=True) as found:
        network(images)
    start = start_rows(found, reading(network, token), images)
    rows = carried_back(found, start, lambda look: look.weights, 0.5)
    return Heat(
        values=rows.cells[:, 0].float().cpu(),
        placement=found.first[1],
        units="share of the attention that flows to the head's token",
        where=_whose(token, "all layers"),
        elsewhere=(1 - rows.cells[:, 0].sum(dim=(1, 2))).float().cpu(),
    )


def relevance(
    network: nn.Module, images: Float[Tensor, "B C I J"], targets: Sequence[int] | Tensor, token: str = ""
) -> Heat:
    """Gradient-weighted attention through all layers, for one class an image; 0 or more."""
    with held_still(network), torch.enable_grad(), explicit(network, gradients=True, local=True) as found:
        logits = network(images)
        score = logits.gather(1, torch.as_tensor(targets, device=logits.device)[:, None]).sum()
        looks = found.looks
        gradients = torch.autograd.grad(score, [look.weights for look in looks], allow_unused=True)
    positive = {
        look.name: (look.weights.detach() * gradient).clamp_min(0).mean(dim=1)  # [B, N, M]
        if gradient is not None
        else look.weights.new_zeros(look.weights.shape[0], *look.weights.shape[2:])
        for look, gradient in zip(looks, gradients, strict=True)
    }
    start = start_rows(found, reading(network, token), images)
    rows = carried_back(found, start, lambda look: positive[look.name], 1.0)
    for move in reversed(found.moves[1:]):
        start = moved(start, move)
    return Heat(
        values=(rows.cells - start.cells)[:, 0]
        .float()
        .cpu(),  # without what averaging gives every cell alike
        placement=found.first[1],
        units="attention times its positive gradient, summed over paths",
        where=_whose(token, "all layers"),
    )


def _whose(token: str, layers: str) -> str:
    return f"{layers}, {token} token" if token else layers
