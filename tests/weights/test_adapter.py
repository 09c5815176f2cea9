"""Rules as data: what is read, what is refused and how the message names it, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import WeightsError
from vitrail.weights import adapter, patterns
from vitrail.weights.adapter import Candidate, Drop, Layout, Rule

JOINED = Layout(
    name="joined",
    signature=("stem.kernel",),
    prefixes=("net.",),
    rules=(
        Rule("net.stem.{kernel|bias}", "entry.proj.{weight|bias}", "conv|copy"),
        Rule("net.pos", "entry.table", fit="positions"),
        Rule("net.block{i+1}.{j}.{kernel|bias}", "stages.{i}.{j}.fc.{weight|bias}", "linear|copy"),
        Rule(("net.q.{i}", "net.k.{i}", "net.v.{i}"), "stages.{i}.qkv"),
        Rule(("net.q_bias.{i}", "", "net.v_bias.{i}"), "stages.{i}.qkv_bias"),
        Rule("net.stack[{i}]", "stages.{i}.scale"),
        Rule("net.both.{i}", ("stages.{i}.left", "stages.{i}.right")),
        Rule("head.{weight|bias}", "head.linear.{weight|bias}", fit="classes"),
        Rule("net.noise", "noise", default="fresh"),
    ),
    dropped=(
        Drop("index.*", "computed from the grid"),
        Drop("pre.*", "belongs to the old head", "fresh_head"),
    ),
)


def ours() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state = {
        "entry.proj.weight": random(4, 3, 2, 2),
        "entry.proj.bias": random(4),
        "entry.table": random(1, 1 + 4, 4),
        "head.linear.weight": random(5, 4),
        "head.linear.bias": random(5),
        "noise": random(2),
    }
    for stage in range(2):
        state[f"stages.{stage}.qkv"] = random(6, 4)
        state[f"stages.{stage}.qkv_bias"] = torch.cat([random(2), torch.zeros(2), random(2)])
        state[f"stages.{stage}.scale"] = random(3)
        state[f"stages.{stage}.left"], state[f"stages.{stage}.right"] = random(2, 4), random(3, 4)
        for place in range(2):
            state[f"stages.{stage}.{place}.fc.weight"] = random(3, 4)
            state[f"stages.{stage}.{place}.fc.bias"] = random(3)
    return state


def theirs() -> dict[str, Tensor]:
    return adapter.write(ours(), JOINED, CONTEXT)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


CONTEXT: dict[str, Any] = {"grid": (2, 2), "prefix": 1}


def test_writing_and_reading_change_no_bit() -> None:
    written = theirs()
    assert written["net.block1.0.kernel"].shape == (4, 3)
    assert written["net.stem.kernel"].shape == (2, 2, 3, 4)
    assert written["net.stack"].shape == (2, 3)
    assert {"net.q.0", "net.k.1", "net.both.1", "net.q_bias.0"} <= written.keys()
    state, receipt = adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    assert state.keys() == ours().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours().items())
    assert set(receipt.used) == set(written) and not (receipt.made or receipt.dropped)
    assert receipt.bytes == sum(tensor.nbytes for tensor in written.values())


@pytest.mark.parametrize("prefix", ["", "net.", "module.net.", "module.", "_orig_mod."])
def test_prefixes_may_be_there_or_not(prefix: str) -> None:
    written = {prefix + key.removeprefix("net."): tensor for key, tensor in theirs().items()}
    state, receipt = adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    assert all(torch.equal(state[name], tensor) for name, tensor in ours().items())
    assert set(receipt.used) == set(written)


def test_a_missing_tensor_is_named_with_the_nearest_key() -> None:
    written = theirs()
    written["net.block1.0.kernels"] = written.pop("net.block1.0.kernel")
    with pytest.raises(WeightsError) as caught:
        adapter.read(written, [JOINED], shapes(ours()), CONTEXT, source="file.pth")
    message = str(caught.value)
    assert "stages.0.0.fc.weight (3, 4) is missing" in message
    assert "the nearest is net.block1.0.kernels (4, 3)" in message
    assert "file.pth" in message and "Nothing was loaded" in message and "\n" not in message


def test_a_tensor_left_over_is_an_error_unless_dropped_on_purpose() -> None:
    written = {**theirs(), "net.index.0": torch.zeros(1), "net.block3.0.bias": torch.zeros(3)}
    with pytest.raises(
        WeightsError, match=r"net\.block3\.0\.bias \(3,\) has no place in the model \(like net\.block"
    ):
        adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    del written["net.block3.0.bias"]
    _, receipt = adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    assert receipt.dropped == (("net.index.0", "computed from the grid"),)
    assert any("computed from the grid" in line for line in receipt.lines())


def test_a_stack_of_more_layers_than_the_model_has_is_an_error() -> None:
    written = {**theirs(), "net.stack": torch.zeros(3, 3)}
    with pytest.raises(WeightsError, match=r"net\.stack \(3, 3\) stacks more than the 2 that the model has"):
        adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    written["net.stack"] = torch.zeros(1, 3)
    with pytest.raises(WeightsError, match=r"stages\.1\.scale \(3,\) cannot be made of net\.stack \(1, 3\)"):
        adapter.read(written, [JOINED], shapes(ours()), CONTEXT)


def test_a_tensor_that_is_cut_needs_all_its_parts_in_the_model() -> None:
    expected = {name: shape for name, shape in shapes(ours()).items() if name != "stages.0.right"}
    with pytest.raises(WeightsError, match=r"a part of it is for stages\.0\.right, which the model has not"):
        adapter.read(theirs(), [JOINED], expected, CONTEXT)


def test_a_wrong_shape_names_both_shapes() -> None:
    written = {**theirs(), "net.block2.1.bias": torch.zeros(7)}
    with pytest.raises(
        WeightsError, match=r"net\.block2\.1\.bias is \(7,\) in the file, the model's stages\.1\.1"
    ):
        adapter.read(written, [JOINED], shapes(ours()), CONTEXT)


def test_a_head_of_other_classes_is_replaced_only_when_asked() -> None:
    written = {
        **theirs(),
        "head.weight": torch.zeros(9, 4),
        "head.bias": torch.zeros(9),
        "net.pre.x": torch.zeros(1),
    }
    with pytest.raises(
        WeightsError, match=r"head\.weight is \(9, 4\) in the file, .* \(5, 4\) \(pass num_classes"
    ):
        adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    state, receipt = adapter.read(written, [JOINED], shapes(ours()), CONTEXT, replace_head=True)
    assert set(receipt.fresh) == {"head.linear.weight", "head.linear.bias"} == ours().keys() - state.keys()
    assert {name for name, _ in receipt.made} == set(receipt.fresh)
    assert ("net.pre.x", "belongs to the old head") in receipt.dropped
    with pytest.raises(WeightsError, match=r"net\.pre\.x"):  # the head is kept, so what belongs to it matters
        kept = {**theirs(), "net.pre.x": torch.zeros(1)}
        adapter.read(kept, [JOINED], shapes(ours()), CONTEXT, replace_head=True)


def test_a_head_is_replaced_whole() -> None:
    written = {**theirs(), "head.weight": torch.zeros(5, 9)}
    state, receipt = adapter.read(written, [JOINED], shapes(ours()), CONTEXT, replace_head=True)
    assert set(receipt.fresh) == {"head.linear.weight", "head.linear.bias"}
    assert "head.linear.bias" not in state


def test_a_head_that_is_kept_stays_kept_when_replacing_is_allowed() -> None:
    state, receipt = adapter.read(theirs(), [JOINED], shapes(ours()), CONTEXT, replace_head=True)
    assert not receipt.fresh and torch.equal(state["head.linear.weight"], ours()["head.linear.weight"])


def test_absent_tensors_take_their_default() -> None:
    written = {key: tensor for key, tensor in theirs().items() if key != "net.noise"}
    state, receipt = adapter.read(written, [JOINED], shapes(ours()), CONTEXT)
    assert receipt.fresh == ("noise",) and "noise" not in state


def test_positions_are_resampled_and_the_receipt_says_so() -> None:
    expected = {**shapes(ours()), "entry.table": (1, 1 + 15, 4)}
    state, receipt = adapter.read(theirs(), [JOINED], expected, {"grid": (3, 5), "prefix": 1})
    assert state["entry.table"].shape == (1, 16, 4)
    assert torch.equal(state["entry.table"][:, 0], ours()["entry.table"][:, 0])
    assert receipt.made[0].story == "positions resampled from 2x2 to 3x5 (bicubic)"
    kept, _ = adapter.read(theirs(), [JOINED], expected, {"grid": (3, 5), "prefix": 1}, adapt=False)
    assert torch.equal(kept["entry.table"], ours()["entry.table"])


def test_a_grid_of_equal_size_but_other_shape_is_resampled_when_known_and_told_when_not() -> None:
    expected = shapes(ours())
    _, known = adapter.read(theirs(), [JOINED], expected, {"grid": (1, 4), "from_grid": [2, 2], "prefix": 1})
    assert known.made[0].story == "positions resampled from 2x2 to 1x4 (bicubic)"
    _, unknown = adapter.read(theirs(), [JOINED], expected, {"grid": (1, 4), "prefix": 1})
    assert "taken as a grid of 1x4" in unknown.made[0].story


def test_patch_kernels_and_channels_are_resampled() -> None:
    layout = Layout("one", (Rule("k", "k", fit="patch"),))
    kernel = torch.randn(4, 3, 16, 16)
    state, receipt = adapter.read({"k": kernel}, [layout], {"k": (4, 1, 8, 12)})
    assert state["k"].shape == (4, 1, 8, 12)
    assert "from 3 to 1" in receipt.made[0].story and "from 16x16 to 8x12" in receipt.made[0].story


def test_the_layout_is_recognised_by_content() -> None:
    other = Layout("other", (Rule("a.{i}", "stages.{i}.scale"),))
    _, receipt = adapter.read(theirs(), [other, JOINED], shapes(ours()), CONTEXT)
    assert receipt.layout == "joined"
    with pytest.raises(WeightsError, match="no layout of this family explains the file"):
        adapter.read({"x.y": torch.zeros(1)}, [other, JOINED], shapes(ours()), CONTEXT)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_models_own_state_dict_is_read(prefix: str) -> None:
    expected = {
        **shapes(ours()),
        "entry.table": (1, 1 + 9, 4),
        "head.linear.weight": (2, 4),
        "head.linear.bias": (2,),
    }
    own = {prefix + name: tensor for name, tensor in ours().items()}
    state, receipt = adapter.read(own, [JOINED], expected, {"grid": (3, 3), "prefix": 1}, replace_head=True)
    assert receipt.layout == "own" and set(receipt.fresh) == {"head.linear.weight", "head.linear.bias"}
    assert torch.equal(state["stages.1.qkv"], ours()["stages.1.qkv"]) and state["entry.table"].shape == (
        1,
        10,
        4,
    )
    with pytest.raises(WeightsError, match=r"module\.more \(1,\) has no place"):
        adapter.read({**own, "module.more": torch.zeros(1)}, [JOINED], shapes(ours()), CONTEXT)


def test_two_meanings_of_the_same_names_are_asked_about() -> None:
    first, second = (Layout(name, (Rule("w", "w", how),)) for name, how in (("a", "copy"), ("b", "linear")))
    state = {"w": torch.arange(4.0).reshape(2, 2)}
    with pytest.raises(WeightsError, match="can be read as a or b"):
        adapter.read(state, [first, second], {"w": (2, 2)})
    told, _ = adapter.read(state, [first, second], {"w": (2, 2)}, layout="b")
    assert torch.equal(told["w"], state["w"].t())
    with pytest.raises(WeightsError, match="there is no layout 'c', only a, b"):
        adapter.read(state, [first, second], {"w": (2, 2)}, layout="c")


def test_conditions_choose_rules_by_the_context() -> None:
    layout = Layout("x", (Rule("n", "before", when="!after"), Rule("n", "behind", when="after pooled")))
    assert adapter.write({"before": torch.ones(1)}, layout, {}).keys() == {"n"}
    assert adapter.write({"behind": torch.ones(1)}, layout, {"after": True, "pooled": True}).keys() == {"n"}
    with pytest.raises(WeightsError, match="has no place for behind"):
        adapter.write({"behind": torch.ones(1)}, layout, {"after": True})


def test_what_a_layout_cannot_hold_is_not_written() -> None:
    state = ours()
    state["stages.0.qkv_bias"] = torch.ones(6)
    with pytest.raises(WeightsError, match=r"a part of stages\.0\.qkv_bias as zero, and it is not"):
        adapter.write(state, JOINED, CONTEXT)
    with pytest.raises(WeightsError, match="has no place for gate"):
        adapter.write({"gate": torch.ones(1)}, JOINED, CONTEXT)


def test_the_nearest_model_is_named() -> None:
    larger = {**shapes(ours()), **{f"stages.{stage}.scale": (3,) for stage in range(2, 6)}}
    models = [
        Candidate("small", [JOINED], lambda: shapes(ours()), CONTEXT),
        Candidate("large", [JOINED], lambda: larger, CONTEXT),
    ]
    likes = adapter.ranked(theirs(), models)
    assert [like.name for like in likes] == ["small", "large"] and likes[0].share == likes[0].exact == 1
    with pytest.raises(WeightsError, match=r"looks like small \(layout joined, 100% of its tensors fit\)"):
        adapter.read(theirs(), [JOINED], larger, CONTEXT, candidates=lambda: models)


def test_a_candidate_is_not_built_where_its_layout_is_not_in_the_file() -> None:
    def never() -> dict[str, tuple[int, ...]]:
        raise AssertionError("built for nothing")

    assert adapter.nearest({"x": torch.zeros(1)}, [Candidate("far", [JOINED], never, {})]) is None


@pytest.mark.parametrize(
    "rule",
    [
        Rule("a", "b", "turn"),
        Rule("a", "b", fit="size"),
        Rule("a", "b", default="twos"),
        Rule("{a|b}", "c{d|e|f}"),
    ],
)
def test_a_rule_with_a_typing_error_says_so(rule: Rule) -> None:
    with pytest.raises(WeightsError):
        adapter.read({"a": torch.zeros(1)}, [Layout("typo", (rule,))], {"b": (1,)})


def test_patterns_work_out_sums() -> None:
    assert patterns.filled("features.{2*i+1}.{j-1}", {"i": 3, "j": 1}) == "features.7.0"
    assert patterns.match("a.{i}.b.{i}", "a.3.b.3") == {"i": 3}
    assert patterns.match("a.{i}.b.{i}", "a.3.b.4") is None
    assert patterns.match("head.*", "head.fc.weight") == {}
    with pytest.raises(WeightsError, match="cannot work out"):
        patterns.filled("a.{k}", {"i": 1})
