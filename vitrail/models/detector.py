"""What all detectors share: a backbone, a head, and what training and saving ask of a network."""

from __future__ import annotations

from vitrail.models.dense import Dense


class Detector(Dense):
    """Images `[B, C, I, J]`, normalised and zero-padded at the bottom and right, to classes and boxes.

    A detector is called with `images` and `padding`, `[B, I, J]`, True at pixels that are no picture, or None
    where there are none; it answers a BoxOutput or a DenseBoxOutput.
    """
