"""Random features: the authors' package's numbers, the estimate's mean and scatter, and when features are redrawn."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_table import measured
from torch import Tensor

from vitrail.errors import ModelError
from vitrail.nn.attention import Attention, attention_weights
from vitrail.nn.performer import (
    Kernel,
    RandomFeatures,
    Redraw,
    default_features,
    draw_projection,
    linear_attention,
    orthogonal_rows,
)

Golden = Callable[[str], dict[str, Any]]

CASES = {
    # case of the golden file: (kernel, factor on q and k)
    "softmax kernel, W as given (Gaussian rows), epsilon 1e-4": (Kernel(epsilon=1e-4), 1.0),
    "softmax kernel, epsilon 1e-6": (Kernel(epsilon=1e-6), 1.0),
    "softmax kernel, q and k times 0.5, epsilon 1e-4": (Kernel(epsilon=1e-4), 0.5),
    "softmax kernel without the d^-1/4 scale (normalize_data false), q and k times 0.3": (
        Kernel(epsilon=1e-4, scaled=False),
        0.3,
    ),
    "generalised (ReLU) kernel": (Kernel("relu", epsilon=1e-3), 1.0),
    "no projection": (Kernel("none", epsilon=0.0), 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_gives_the_reference_packages_numbers(case: str, golden: Golden, fill: ModuleType) -> None:
    numbers = golden("performer_kernel")
    expected = next(each for each in numbers["cases"] if each["case"] == case)["float64"]
    shapes = {entry["name"]: entry["shape"] for entry in numbers["inputs"]}
    inputs = {
        name: torch.from_numpy(fill.picture(*shape, name=name)).double() for name, shape in shapes.items()
    }
    kernel, factor = CASES[case]
    projection = None if kernel.form == "none" else inputs["projection"]
    queries = kernel.features(inputs["q"] * factor, projection, keys=False)
    keys = kernel.features(inputs["k"] * factor, projection, keys=True)
    out = linear_attention(queries, keys, inputs["v"])
    if "query_features" in expected:
        assert _apart(queries.flatten()[:16], expected["query_features"]["first16"]) < 1e-6
        assert _apart(keys.flatten()[:16], expected["key_features"]["first16"]) < 1e-6
    found = _apart(out.flatten(), expected["output"]["all_values"])
    assert measured(found, "performer", "reference package", variant=case.partition(",")[0]) < 1e-6


def test_rows_are_the_reference_packages_up_to_their_sign(golden: Golden, fill: ModuleType) -> None:
    for case in golden("performer_kernel")["orthogonal_matrix_cases"]:
        rows, width = case["rows"], case["columns"]
        draws = [
            torch.from_numpy(fill.picture(*draw["shape"], name=draw["name"])).double()
            for draw in case["draws_in_order"]
        ]
        blocks = draws[: -(-rows // width)]
        expected = torch.tensor(case["float64"]["matrix"]["all_values"], dtype=torch.float64).view(
            rows, width
        )
        directions = orthogonal_rows(torch.stack(blocks)).flatten(0, 1)[:rows]
        lengths = draws[-1].norm(dim=1, keepdim=True) if case["scaling"] == 0 else width**0.5
        ours = directions * lengths
        signs = (ours * expected).sum(dim=1, keepdim=True).sign()
        assert _apart(ours * signs, expected) < 1e-6


def test_rows_are_orthogonal_in_blocks_at_the_lengths_asked_for() -> None:
    torch.manual_seed(0)
    for lengths, length in (("width", 8**0.5), ("features", 20**0.5)):
        matrix = draw_projection(20, 8, lengths)  # type: ignore[arg-type]
        assert torch.allclose(matrix.norm(dim=1), torch.full((20,), length), atol=1e-5)
        for block in matrix.split(8):
            products = block @ block.T
            assert torch.allclose(products, length**2 * torch.eye(len(block)), atol=1e-4)
    squares = draw_projection(4000, 8).square().sum(dim=1)  # chi-square of 8 degrees: mean 8, variance 16
    assert squares.mean() == pytest.approx(8, abs=0.3)
    assert squares.var() == pytest.approx(16, rel=0.15)


def test_directions_are_uniform_over_all_rotations() -> None:
    torch.manual_seed(0)
    q = orthogonal_rows(torch.randn(4000, 6, 6, dtype=torch.float64))
    # without the signs of R, the first entry of the first row is negative every time
    assert (q[:, 0, 0] < 0).double().mean() == pytest.approx(0.5, abs=0.03)
    assert q.mean(dim=0).abs().max() < 0.03
    assert (q.square().mean(dim=0) - 1 / 6).abs().max() < 0.01


def test_features_estimate_the_softmax_kernel_without_bias() -> None:
    exact, estimates = _estimates(draw_projection(16 * 20_000, 16))
    assert (estimates.mean(dim=0) / exact - 1).abs().max() < 0.01


def test_orthogonal_rows_scatter_less_than_independent_ones() -> None:
    exact, independent = _estimates(torch.randn(16 * 5000, 16))
    _, orthogonal = _estimates(draw_projection(16 * 5000, 16))
    # theory for independent rows: K² (exp(|q + k|²) - 1) / m; |q| = |k| = 1/2, so |q + k|² = 1/2 + 2 ln K
    theory = (exact.square() * ((0.5 + 2 * exact.log()).exp() - 1) / 16).mean()
    assert (independent - exact).square().mean() == pytest.approx(float(theory), rel=0.1)
    assert (orthogonal - exact).square().mean() < 0.9 * theory


def _estimates(rows: Tensor) -> tuple[Tensor, Tensor]:
    """exp(q·k) of four queries and four keys, 1/2 long after the scaling, and its estimates by 16 rows each."""
    torch.manual_seed(0)
    # Of length 1, so that |x| 16^(-1/4) = 1/2.
    queries, keys = (torch.nn.functional.normalize(torch.randn(4, 16), dim=1) for _ in range(2))
    kernel = Kernel(epsilon=0.0, stabilised=False)
    phi_q = kernel.features(queries, rows, keys=False).unflatten(1, (-1, 16))  # [4, T, 16]
    phi_k = kernel.features(keys, rows, keys=True).unflatten(1, (-1, 16))
    return (queries @ keys.T / 4).exp(), torch.einsum("qtm,ktm->tqk", phi_q, phi_k) * len(rows) / 16


def test_the_error_against_softmax_attention_falls_with_the_features() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 50, 64) * 0.5, torch.randn(2, 50, 64) * 0.5
    values = torch.randn(2, 50, 64)
    exact = attention_weights(queries, keys, 64**-0.5) @ values
    errors = []
    for count in (32, 128, 512, 2048):
        trials = []
        for _ in range(12):
            projection = draw_projection(count, 64)
            phi = [
                Kernel().features(each, projection, keys=is_keys)
                for each, is_keys in ((queries, False), (keys, True))
            ]
            trials.append(_apart(linear_attention(*phi, values), exact))
        errors.append(sum(trials) / len(trials))
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(errors))
    # four times the features, half the error
    assert errors[-1] == pytest.approx(errors[-2] / 2, rel=0.25)


def test_the_linear_way_equals_the_written_matrix() -> None:
    torch.manual_seed(0)
    for kernel in (Kernel(), Kernel("relu", 1e-3), Kernel("none", 0.0)):
        mixer = RandomFeatures(32, 2, kernel=kernel).double()
        tokens = torch.randn(2, 9, 32, dtype=torch.float64)
        weights = mixer.weights(tokens)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
        assert (weights >= 0).all()
        assert torch.allclose(mixer(tokens), mixer.mix(weights, tokens), atol=1e-12)


def test_a_constant_value_comes_back_and_stabilisers_cancel() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 7, 8).double(), torch.randn(1, 7, 8).double()
    projection, values = draw_projection(24, 8).double(), torch.randn(1, 7, 5).double()
    constant = values[:, :1].expand(-1, 7, -1)
    plain, steady = Kernel(epsilon=0.0, stabilised=False), Kernel(epsilon=0.0)
    results = []
    for kernel in (plain, steady):
        phi = [
            kernel.features(each, projection, keys=is_keys)
            for each, is_keys in ((queries, False), (keys, True))
        ]
        assert torch.allclose(linear_attention(*phi, constant), constant)
        results.append(linear_attention(*phi, values))
    assert torch.allclose(*results, atol=1e-12)


def test_large_inputs_stay_finite_in_half_precision() -> None:
    torch.manual_seed(0)
    mixer, tokens = RandomFeatures(32, 2), 30 * torch.randn(2, 9, 32)
    assert torch.isfinite(mixer(tokens)).all()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(tokens)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    assert torch.isfinite(mixer.bfloat16()(tokens.bfloat16())).all()


def test_has_the_parameters_of_softmax_attention() -> None:
    theirs, ours = Attention(32, 2), RandomFeatures(32, 2)
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    assert set(ours.state_dict()) - set(theirs.state_dict()) == {"projection"}
    assert default_features(64) == 266
    with pytest.raises(ModelError, match="at least 1 feature"):
        RandomFeatures(32, 2, features=0)


class Net(torch.nn.Module):
    """Two layers and their redrawing, the way a trunk has them."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([RandomFeatures(16, 2, features=8) for _ in range(2)])
        self.redraw = Redraw(list(self.layers), every)  # type: ignore[arg-type]

    def forward(self, map: Tensor) -> Tensor:
        map, _ = self.redraw(map, None)
        tokens = map.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    def drawn(self) -> Tensor:
        return torch.stack([layer.projection for layer in self.layers])


def test_features_are_redrawn_after_so_many_training_forwards_and_never_in_evaluation() -> None:
    torch.manual_seed(0)
    net, map = Net(every=3), torch.randn(1, 16, 2, 2)
    first = net.drawn().clone()
    net.eval()
    for _ in range(7):
        net(map)
    assert torch.equal(net.drawn(), first) and int(net.redraw.calls) == 0
    net.train()
    net(map), net(map)
    assert torch.equal(net.drawn(), first)
    net(map)
    second = net.drawn().clone()
    assert (second != first).any(dim=2).all()
    assert not torch.equal(second[0], second[1])
    net(map)
    assert torch.equal(net.drawn(), second)


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws() -> None:
    torch.manual_seed(0)
    net, map = Net(every=2).train(), torch.randn(1, 16, 2, 2)
    for _ in range(3):
        net(map)
    torch.manual_seed(99)  # another process: nothing may hang on the default generator
    resumed = Net(every=2).train()
    resumed.load_state_dict(net.state_dict())
    for _ in range(3):
        torch.rand(5)
        net(map), resumed(map)
        assert torch.equal(net.drawn(), resumed.drawn())


def test_a_copy_redraws_its_own_features() -> None:
    net = Net(every=1).train()
    other = copy.deepcopy(net)
    before = net.drawn().clone()
    other(torch.randn(1, 16, 2, 2))
    assert torch.equal(net.drawn(), before) and not torch.equal(other.drawn(), before)


def _apart(ours: Any, theirs: Any) -> float:
    one, other = (torch.as_tensor(each, dtype=torch.float64).flatten() for each in (ours, theirs))
    return float((one - other).norm() / other.norm())
