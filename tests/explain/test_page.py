"""The page of explanations in a real browser, by mouse and by keyboard, in light and dark."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.explain.families import tiny
from vitrail.explain.explainer import Explainer
from vitrail.explain.explorer_page import explorer

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright in this environment: python -m pip install playwright"
    )
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def page_of(family: str, folder: Path, score: bool = False, **changes: Any) -> Path:
    model = tiny(family, **changes)
    model.card = dataclasses.replace(model.card, labels=("ant", "bee", "cat", "dog", "elk"))
    explainer = Explainer(model)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    found = [explainer(pixels, "cat", method, score=score) for method in ("relevance", "rollout")]
    path = folder / f"{family}.html"
    path.write_text(explorer(explainer, found), encoding="utf-8")
    return path


def opened(browser: Any, path: Path, scheme: str = "light") -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else troubles.append(request.url),
    )
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    return page, troubles


@pytest.mark.parametrize("family", ["vit", "deit", "cait", "pvt", "swin", "t2t", "pit", "performer"])
def test_every_layer_can_be_looked_at(browser: Any, family: str, tmp_path: Path) -> None:
    page, troubles = opened(browser, page_of(family, tmp_path))
    layers = int(page.get_attribute("#layer", "max")) + 1
    words = set()
    for number in range(layers):
        page.evaluate(
            "(n) => { const l = document.getElementById('layer'); l.value = n; l.dispatchEvent(new Event('input')); }",
            number,
        )
        page.hover("#picture", position={"x": 30, "y": 40})
        words.add(page.inner_text("#lookswords"))
        assert page.inner_text("#lookswords") and page.inner_text("#seenwords")
        assert page.inner_text("#layername") == f"{number + 1} of {layers}"
    assert len(words) > 1
    assert troubles == []
    page.close()


def test_pointing_holding_and_letting_go(browser: Any, tmp_path: Path) -> None:
    page, troubles = opened(browser, page_of("vit", tmp_path, score=True))
    area = page.locator("#picture").bounding_box()
    page.mouse.move(area["x"] + 5, area["y"] + 5)
    assert page.inner_text("#lookswords").startswith("Row 1, column 1")
    page.mouse.move(area["x"] + area["width"] - 5, area["y"] + 5)
    assert page.inner_text("#lookswords").startswith("Row 1, column 4")
    page.mouse.click(area["x"] + 5, area["y"] + area["height"] - 5)
    page.mouse.move(area["x"] + area["width"] - 5, area["y"] + 5)
    assert page.inner_text("#lookswords").startswith("Row 4, column 1")  # held
    page.mouse.click(area["x"] + 5, area["y"] + 5)
    page.mouse.move(area["x"] + area["width"] - 5, area["y"] + 5)
    assert page.inner_text("#lookswords").startswith("Row 1, column 4")  # let go
    page.click("#tokens button")
    assert "class token attends" in page.inner_text("#lookswords")
    assert page.locator("#scores tbody tr").count() == 6
    assert troubles == []
    page.close()


def test_everything_can_be_done_by_keyboard(browser: Any, tmp_path: Path) -> None:
    page, troubles = opened(browser, page_of("vit", tmp_path))
    page.focus("#picture")
    before = page.inner_text("#lookswords")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#lookswords") != before
    assert page.inner_text("#lookswords").startswith("Row 1, column 2")
    page.keyboard.press("-")
    assert page.inner_text("#layername") == "1 of 2"
    assert "block" in page.inner_text("#live")  # what a screen reader is told
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
    assert {"picture", "head", "map", "palette"} <= reached
    assert troubles == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes_and_palettes(browser: Any, scheme: str, tmp_path: Path) -> None:
    page, troubles = opened(browser, page_of("deit", tmp_path), scheme)
    contrast = page.evaluate("""() => {
      const light = (text) => { const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map((v) => v / 255)
        .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const back = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('p, figcaption, h1, h2, label')].map((node) => {
        const front = light(getComputedStyle(node).color);
        return (Math.max(front, back) + .05) / (Math.min(front, back) + .05);
      });
    }""")
    assert min(contrast) >= 4.5
    for palette in ("inferno", "cividis", "viridis", "grey"):
        page.select_option("#palette", palette)
    page.select_option("#head", "1")
    page.select_option("#map", label="none")
    page.click("#theme")
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    assert troubles == []
    page.close()


def test_the_outermost_cells_reach_the_edges_of_the_picture(browser: Any, tmp_path: Path) -> None:
    """A stem of convolutions puts the middle of cell 0 on pixel 0: half a cell would be left bare at the far edges."""
    page, troubles = opened(browser, page_of("vit", tmp_path, stem="conv"))
    place = page.evaluate("() => layer().place")
    assert place[2] < 0 and place[3] < 0
    first, last = page.evaluate(
        "() => [box(layer(), 0, 0), box(layer(), layer().rows - 1, layer().columns - 1)]"
    )
    side = page.evaluate("() => document.getElementById('looks').width")
    assert min(first[:2]) <= 0
    assert last[0] + last[2] >= side and last[1] + last[3] >= side
    assert troubles == []
    page.close()


def test_a_box_is_outlined_over_its_maps_and_no_attention_is_offered(browser: Any, tmp_path: Path) -> None:
    explainer = Explainer(tiny("fcos"))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    found = [explainer(pixels, method=method) for method in ("gradcam", "occlusion")]
    path = tmp_path / "box.html"
    path.write_text(explorer(explainer, found), encoding="utf-8")
    page, troubles = opened(browser, path)
    assert "in the box" in page.inner_text("header")
    assert page.is_visible("#picture") and page.is_visible("#alone")
    assert not page.is_visible("#looks") and not page.is_visible("#layer") and not page.is_visible("#head")
    before = page.inner_text("#mapwords")
    page.select_option("#map", label="occlusion")
    assert page.inner_text("#mapwords") != before
    white = """() => {
      const canvas = document.getElementById('picture');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      let found = 0; for (let i = 0; i < data.length; i += 4) found += data[i] + data[i + 1] + data[i + 2] === 765;
      return found;
    }"""
    assert page.evaluate(white) > 100
    assert troubles == []
    page.close()
