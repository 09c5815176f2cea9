"""Rules that the layouts of all residual networks share: one convolution with its norm, blocks, and what is dropped."""

from __future__ import annotations

import dataclasses

from vitrail.weights.adapter import Drop, Rule

BLOCK = "backbone.stages.{s}.blocks.{b}"

DROPPED = (Drop("*.num_batches_tracked", "frozen norms count nothing", when="frozen"),)


def convolution(conv: str, norm: str, ours: str, fit: str = "") -> tuple[Rule, ...]:
    """A convolution without bias and its batch norm, by their places in a file and in the model."""
    words = "{weight|bias|running_mean|running_var}"
    return (
        Rule(f"{conv}.weight", f"{ours}.conv.weight", fit=fit),
        Rule(f"{norm}.{words}", f"{ours}.norm.{words}"),
        Rule(f"{norm}.num_batches_tracked", f"{ours}.norm.num_batches_tracked", default="zeros"),
    )


def stem(conv: str, norm: str, ours: str) -> tuple[Rule, ...]:
    """One convolution and its norm, or the three of a deep stem, which torch numbers with their norms and ReLUs."""
    deep = (
        *convolution(f"{conv}.0", f"{conv}.1", f"{ours}.0", fit="channels"),
        *convolution(f"{conv}.3", f"{conv}.4", f"{ours}.1"),
        *convolution(f"{conv}.6", norm, f"{ours}.2"),
    )
    return (
        *(
            dataclasses.replace(rule, when="!deep")
            for rule in convolution(conv, norm, f"{ours}.0", fit="channels")
        ),
        *(dataclasses.replace(rule, when="deep") for rule in deep),
    )


def blocks(block: str, ours: str = BLOCK) -> tuple[Rule, ...]:
    """torchvision's words for a block, which nearly everybody shares; `block` is its place in the file."""
    return (
        *convolution(f"{block}.conv{{k+1}}", f"{block}.bn{{k+1}}", f"{ours}.layers.{{k}}"),
        *convolution(f"{block}.downsample.0", f"{block}.downsample.1", f"{ours}.shortcut"),
    )


def linear(theirs: str) -> Rule:
    """The last layer."""
    return Rule(f"{theirs}.{{weight|bias}}", "head.linear.{weight|bias}", fit="classes")
