"""Gates for convolutional networks: squeeze-and-excitation, and non-local blocks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError

Pairwise = Literal["gaussian", "embedded", "dot", "concatenation"]


class SqueezeExcite(nn.Module):
    """Each channel times a factor in (0, 1) that follows from the mean of all channels (Hu et al. 1709.01507).

    squeeze s = mean over rows and columns; factor e = sigmoid(W2 relu(W1 s + b1) + b2), W1 to `hidden` numbers.
    """

    def __init__(self, channels: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def forward(self, map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return map * self.factors(map)[:, :, None, None]

    def factors(self, map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C"]:
        """What each channel is multiplied by."""
        return torch.sigmoid(self.fc2(F.relu(self.fc1(map.mean((2, 3))))))


class NonLocal(nn.Module):
    """Every place of a map adds a weighted sum over all places (Wang et al. 2018, 1711.07971, section 3).

        y_i = 1/Z Σ_j f(x_i, x_j) g(x_j)        z = x + norm(W y)

        gaussian        f = exp(x_i · x_j)                       Z = Σ_j f
        embedded        f = exp(θ x_i · φ x_j)                   Z = Σ_j f      (one head of attention)
        dot             f = θ x_i · φ x_j                        Z = number of j
        concatenation   f = relu(w · [θ x_i, φ x_j])             Z = number of j

    θ, φ, g and W are 1 x 1 convolutions, g to half the channels. `subsample` takes the maximum of 2 x 2 places
    for the j: "after" φ and g (the paper) or "before" them (the authors' code); the two are different functions.
    `scaled` multiplies the embedded form's scores by the inner width to the power -1/2 (the authors' code; not
    in the paper). The norm's scale and shift start at zero, or W does where `norm` is off, so that a fresh block
    changes nothing.
    """

    def __init__(
        self,
        channels: int,
        inner: int | None = None,
        *,
        form: Pairwise = "embedded",
        subsample: Literal["none", "after", "before"] = "after",
        scaled: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        inner = max(channels // 2, 1) if inner is None else inner
        if scaled and form != "embedded":
            raise ModelError(f"scaled=True goes with the form 'embedded'; got {form!r}.")
        self.form, self.subsample = form, subsample
        self.scale = inner**-0.5 if scaled else 1.0
        if form != "gaussian":
            self.theta = nn.Conv2d(channels, inner, 1)
            self.phi = nn.Conv2d(channels, inner, 1)
        if form == "concatenation":
            self.pair = nn.Conv2d(2 * inner, 1, 1, bias=False)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.Identity() if norm is None else norm

    def init_weights(self) -> None:
        """Initial weights of the authors' code: N(0, 0.01), biases zero, and a block that changes nothing."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.norm, nn.Identity):
            nn.init.zeros_(self.out.weight)
        else:
            nn.init.zeros_(self.norm.weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.norm.bias)  # type: ignore[arg-type]

    def forward(self, map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return self.mix(self.weights(map), map)

    def weights(self, map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 1 N M"]:
        """f(x_i, x_j) / Z of all places i and (sub-sampled) j, row by row; sums to one in the softmax forms."""
        queries, keys = self._queries(map), self._keys(map)  # [B, N, E], [B, M, E]
        if self.form in ("gaussian", "embedded"):
            weights = torch.softmax(self.scale * queries @ keys.transpose(1, 2), dim=-1)
        elif self.form == "dot":
            weights = queries @ keys.transpose(1, 2) / keys.shape[1]
        else:  # w · [θ, φ] is a sum of two numbers, so that no N x M table of pairs is made
            first, second = self.pair.weight.flatten().chunk(2)  # [E] each
            sums = (queries @ first)[:, :, None] + (keys @ second)[:, None, :]  # [B, N, M]
            weights = F.relu(sums) / keys.shape[1]
        return weights[:, None]  # [B, 1, N, M]

    def mix(
        self, weights: Float[Tensor, "B 1 N M"], map: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        mixed = weights[:, 0] @ self._others(map, self.g)  # [B, N, E]
        summed = mixed.transpose(1, 2).unflatten(2, map.shape[2:])  # [B, E, h, w]
        changed: Tensor = map + self.norm(self.out(summed))
        return changed

    def _queries(self, map: Tensor) -> Float[Tensor, "B N E"]:
        embedded = map if self.form == "gaussian" else self.theta(map)
        return embedded.flatten(2).transpose(1, 2)

    def _keys(self, map: Tensor) -> Float[Tensor, "B M E"]:
        return self._others(map, nn.Identity() if self.form == "gaussian" else self.phi)

    def _others(self, map: Tensor, project: nn.Module) -> Float[Tensor, "B M E"]:
        """The places j, projected. Raises ModelError for a map too small to be subsampled."""
        if self.subsample != "none" and not torch.compiler.is_exporting() and min(map.shape[2:]) < 2:
            raise ModelError(
                "A non-local block that takes maxima of 2 x 2 places needs a map of 2 x 2 at least; got"
                f" {map.shape[2]} x {map.shape[3]}: give larger pictures, or build it with subsample='none'."
            )
        if self.subsample == "before":
            projected = project(F.max_pool2d(map, 2))
        elif self.subsample == "after":
            projected = F.max_pool2d(project(map), 2)
        else:
            projected = project(map)
        places: Tensor = projected.flatten(2).transpose(1, 2)
        return places
