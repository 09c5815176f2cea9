from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.explain.families import FAMILIES, pictures, tiny
from vitrail.errors import ConfigError, UnsupportedError
from vitrail.explain.capture import stages_of
from vitrail.explain.explainer import Explainer
from vitrail.explain.gradients import gradcam, input_gradient, integrated_gradients, scores
from vitrail.explain.methods import (
    METHODS,
    Options,
    check_options,
    choose,
    default_method,
    heat_of,
    methods_for,
)
from vitrail.explain.occlusion import occlusion

OPTIONS = Options(grid=(4, 4), steps=4)
PAIRS = [(family, method) for family in FAMILIES for method in methods_for(tiny(family))]


def state(model: torch.nn.Module) -> list[Any]:
    """Everything that an explanation might leave behind."""
    hooks = [
        (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            module.training,
        )
        for module in model.modules()
    ]
    owned = [sorted(vars(module)) for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return [hooks, owned, flags, [getattr(stage, "recompute", None) for stage in stages_of(model).values()]]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_every_pair_gives_a_map_a_picture_and_leaves_nothing_behind(family: str, method: str) -> None:
    model = tiny(family).train()
    next(model.parameters()).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = True
    before = state(model)
    images = pictures(model, 3)
    whole = heat_of(model, images, [0, 1, 2], method, OPTIONS)
    assert state(model) == before
    assert whole.values.shape[0] == 3 and torch.isfinite(whole.values).all()
    assert not whole.values.requires_grad
    alone = heat_of(model, images[1:2], [1], method, OPTIONS)
    reach = float(whole.values.abs().max())
    assert torch.allclose(alone.values[0], whole.values[1], atol=1e-5 * max(1.0, reach))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_inside_leaves_nothing_behind_either(family: str) -> None:
    model = tiny(family)

    def failing(*_: Any) -> None:
        raise RuntimeError("the head has failed")

    model.head.forward = failing
    before = state(model)
    for method in methods_for(model):
        with pytest.raises(RuntimeError, match="the head has failed"):
            heat_of(model, pictures(model, 1), [0], method, OPTIONS)
        assert state(model) == before


def test_the_table_in_the_docs_is_what_the_code_does() -> None:
    rows = ["| family | " + " | ".join(METHODS) + " | auto |", "|---|" + "---|" * (len(METHODS) + 1)]
    for family in FAMILIES:
        model = tiny(family)
        defined = methods_for(model)
        cells = ["yes" if method in defined else "–" for method in METHODS]
        rows.append(f"| {family} | " + " | ".join(cells) + f" | {default_method(model)} |")
    table = "\n".join(rows)
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
    assert table in page, f"docs/explain.md should hold this table:\n{table}"


def test_an_undefined_pair_says_what_works() -> None:
    works = "rollout is not defined for .*gradcam, integrated_gradients, occlusion"
    with pytest.raises(UnsupportedError, match=works):
        choose(tiny("resnet"), "rollout")
    with pytest.raises(ConfigError, match="Did you mean relevance"):
        choose(tiny("vit"), "relevanse")
    with pytest.raises(ConfigError, match="gradcam takes no head; head goes with: attention"):
        check_options(["gradcam"], Options(head=1))
    with pytest.raises(ConfigError, match="layer must be 0 to 1"):
        heat_of(tiny("vit"), pictures(tiny("vit")), [0, 0], "attention", Options(layer=7))
    with pytest.raises(ConfigError, match="heads 0 to 1"):
        heat_of(tiny("vit"), pictures(tiny("vit")), [0, 0], "attention", Options(head=5))
    with pytest.raises(ConfigError, match=r"before the patches .class, 0.; got 'distillation'"):
        heat_of(tiny("vit"), pictures(tiny("vit")), [0, 0], "rollout", Options(token="distillation"))
    with pytest.raises(ConfigError, match="leave the layer out"):
        gradcam(tiny("resnet"), pictures(tiny("resnet")), [0, 0], layer=1)
    with pytest.raises(ConfigError, match="no longer depends"):
        gradcam(tiny("vit"), pictures(tiny("vit")), [0, 0], layer=-1)


def test_integrated_gradients_are_complete_on_a_linear_head() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    images = torch.randn(2, 3, 4, 4)
    heat = integrated_gradients(network, images, [0, 2], steps=4)
    change = scores(network, images, [0, 2]) - scores(network, torch.zeros_like(images), [0, 2])
    assert torch.allclose(heat.values.sum((1, 2)), change, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("t2t", "pit") else name for name in FAMILIES],
)
def test_integrated_gradients_sum_to_the_change_of_the_logit(family: str) -> None:
    model = tiny(family)
    images = pictures(model)
    with torch.no_grad():
        change = scores(model, images, [0, 1]) - scores(model, torch.zeros_like(images), [0, 1])
    # a grey image of equal tokens makes layer norms steep where the path begins: these two want finer steps
    heat = integrated_gradients(model, images, [0, 1], steps=2048 if family in ("t2t", "pit") else 64)
    kinks = 0.05 if not stages_of(model) else 0.01  # ReLU and max-pool have kinks that the rule steps over
    assert torch.allclose(heat.values.sum((1, 2)), change, rtol=kinks, atol=kinks * float(change.abs().max()))


def test_integrated_gradients_are_captums() -> None:
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    model = tiny("vit")
    images = pictures(model)
    ours = integrated_gradients(model, images, [0, 1], steps=16).values
    theirs = captum.IntegratedGradients(model).attribute(
        images, torch.zeros_like(images), target=torch.tensor([0, 1]), n_steps=16, method="riemann_middle"
    )
    assert torch.allclose(ours, theirs.sum(1).detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["vit", "swin", "cait"])
def test_gradient_times_input_agrees_with_central_differences(family: str) -> None:
    from scipy.stats import spearmanr

    model = tiny(family).double()
    images = pictures(model, 1).double()
    gradient = (input_gradient(model, images, [2]) * images)[0].sum(0)
    generator = torch.Generator().manual_seed(3)
    exact, steps = [], []
    for _ in range(100):
        row, column = torch.randint(0, images.shape[2] - 4, (2,), generator=generator).tolist()
        box = (slice(row, row + 4), slice(column, column + 4))
        steps.append(torch.zeros_like(images[0]))
        steps[-1][:, *box] = images[0][:, *box] * 1e-5
        exact.append(float(gradient[box].sum()))
    with torch.no_grad():
        targets = torch.full((100,), 2)
        above, below = (scores(model, images + sign * torch.stack(steps), targets) for sign in (1, -1))
    differences = (above - below).tolist()
    assert spearmanr(exact, differences).statistic >= 0.99


def test_gradcam_on_averaged_cells_is_the_class_activation_map() -> None:
    model = tiny("swin")
    images = pictures(model)
    features = model.forward_features(images)  # [B, N, D] after the norm
    weight = model.get_classifier().weight
    expected = torch.stack([features[i] @ weight[t] for i, t in enumerate((0, 3))]) / features.shape[1]
    heat = gradcam(model, images, [0, 3])
    assert torch.allclose(heat.values.flatten(1), expected.clamp_min(0), atol=1e-6)


def test_occlusion_is_what_covering_costs() -> None:
    model = tiny("vit")
    images = pictures(model, 1)
    heat = occlusion(model, images, [2], (4, 4))
    covered = images.clone()
    covered[:, :, 8:16, 24:32] = 0
    with torch.no_grad():
        fall = model(images).log_softmax(1)[0, 2] - model(covered).log_softmax(1)[0, 2]
    assert float(heat.values[0, 1, 3]) == pytest.approx(float(fall), abs=1e-5)


@pytest.mark.slow
def test_a_thousand_explanations_leave_memory_as_it_was() -> None:
    import gc
    import resource

    model = tiny("vit")
    images = pictures(model, 1)

    def many(count: int) -> int:
        for number in range(count):
            heat_of(model, images, [0], ("relevance", "rollout", "gradcam")[number % 3], OPTIONS)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    warm = many(300)
    assert many(1000) - warm <= 1024  # KiB


@pytest.mark.parametrize(
    ("family", "changes", "options", "said"),
    [
        (
            "vit",
            {"class_token": False, "pool": "mean"},
            {"token": "nonsense"},
            "no tokens before the patches",
        ),
        ("vit", {}, {"token": "nonsense"}, "before the patches .class, 0.; got 'nonsense'"),
        ("cait", {}, {"layer": 0, "token": "7"}, "another layer"),
        ("swin", {}, {"token": "class"}, "no tokens before the patches"),
        ("senet", {}, {"token": "class"}, "neither heads nor tokens: leave token out"),
        ("senet", {}, {"head": 1}, "neither heads nor tokens: leave head out"),
        ("detr", {}, {"layer": 0, "head": 1}, "leave layer and head out"),
    ],
)
def test_attention_refuses_what_it_would_pass_over(
    family: str, changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    network = Explainer(tiny(family, **changes)).network
    with pytest.raises(ConfigError, match=said):
        heat_of(network, torch.zeros(1, 3, 32, 32), [0], "attention", Options(**options))
