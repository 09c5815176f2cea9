"""A trace as one self-contained HTML page: no request leaves it, keyboard and screen readers included."""

from __future__ import annotations

import dataclasses
import html
import json
from typing import Any

from torch import Tensor

from vitrail.explain.pages import data_url, fill_template, packed
from vitrail.explain.trace import Layer, StageTrace, Trace
from vitrail.explain.trace_poster import contrasted, shortened, stepping
from vitrail.explain.trace_words import words
from vitrail.tasks.draw import as_rgb

MOST_CHANNELS = 192
"""Channels of the embeddings that the page draws; its caption says how many there are."""


def page(trace: Trace) -> str:
    """The page's text. Everything it shows is in it: the image, the maps as bytes, style and script."""
    best = trace.prediction.top[0]
    data = json.dumps(page_data(trace), separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    told = words(trace)
    texts = {
        "TITLE": html.escape(f"{trace.source} through {trace.model}"),
        "SUMMARY": html.escape(f"{trace.model} says {best.label}, {best.score:.1%}"),
        "NOTE": f'<p class="note">{html.escape(trace.note)}</p>' if trace.note else "",
        "STEPS": _rows(trace),
        "CUT": told.cut,
        "PIECE": told.piece,
        "FLAT": told.flat,
        "MADE": told.made,
        "PLACED": told.placed,
        "BLOCKS": told.blocks,
        "CELLS": "cells" if trace.convolutional else "patch tokens",
        "DATA": data,
    }
    return fill_template("trace.html", texts)


def _rows(trace: Trace) -> str:
    return "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(size)}</td><td>{html.escape(note)}</td></tr>"
        for name, size, note in shortened(trace)
    )


def page_data(trace: Trace) -> dict[str, Any]:
    """What the page draws, JSON-ready: the image as a PNG, maps as bytes, words for what is shown."""
    return {
        "image": data_url(as_rgb(trace.pixels)),
        "words": dataclasses.asdict(words(trace)),
        "channels": int(trace.pixels.shape[0]),
        "height": int(trace.pixels.shape[1]),
        "width": int(trace.pixels.shape[2]),
        "patch": list(trace.patch),
        "step": [window.stride for window in trace.windows],
        "corner": [window.first(0) for window in trace.windows],
        "far": stepping(trace),
        "place": list(trace.placement),
        "mark": list(contrasted(trace)),
        "stages": [_stage(stage) for stage in trace.stages],
        "layers": [_layer(layer) for stage in trace.stages for layer in stage.layers],
        "top": [{"label": guess.label, "score": guess.score} for guess in trace.prediction.top],
    }


def _stage(stage: StageTrace) -> dict[str, Any]:
    shown = stage.embeddings[:, :MOST_CHANNELS]
    return {
        "name": stage.name,
        "grid": list(stage.grid),
        "prefix": list(stage.prefix),
        "channels": int(stage.embeddings.shape[1]),
        "embeddings": _signed(shown, float(shown.abs().quantile(0.99)) if shown.numel() < 10**7 else None),
        "similarity": None
        if stage.similarity is None
        else _similarity(stage.similarity, stage.least_similarity),
        "references": [list(place) for place in stage.references],
    }


def _similarity(values: Tensor, least: float) -> dict[str, Any]:
    """Cosines as bytes: 0 is `least`, 255 is 1."""
    return {
        "shape": list(values.shape),
        "least": least,
        "data": packed((values - least) / (1 - least) * 255),
    }


def _layer(layer: Layer) -> dict[str, Any]:
    view: dict[str, Any] = {
        "name": layer.name,
        "grid": list(layer.grid),
        "place": list(layer.placement),
        "component": _signed(layer.component, None),
        "gaze": None,
    }
    if layer.gaze is not None:
        maps = layer.gaze.maps
        most = float(maps.max()) or 1.0
        view["gaze"] = {
            "token": layer.gaze.token,
            "kind": layer.gaze.kind,
            "grid": list(maps.shape[1:]),
            "heads": int(maps.shape[0]),
            "most": most,
            "elsewhere": [round(float(share), 4) for share in layer.gaze.elsewhere],
            "data": packed(maps / most * 255),
        }
    return view


def _signed(values: Tensor, reach: float | None) -> dict[str, Any]:
    """Values around zero as bytes: 0 is -reach, 255 is +reach; reach defaults to the largest magnitude."""
    reach = (float(values.abs().max()) if reach is None else reach) or 1.0
    return {
        "shape": list(values.shape),
        "reach": reach,
        "data": packed((values / reach).clamp(-1, 1) * 127.5 + 127.5),
    }
