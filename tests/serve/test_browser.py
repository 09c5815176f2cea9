"""The page in a real browser: drop, paste, choose; bars, reasons, story, attention; by mouse, keyboard and thumb."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrail
from tests.serve.service import LABELS, Running, picture, running

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CONTRAST = """() => {
  const light = (text) => { const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map((v) => v / 255)
    .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (node) => { for (; node; node = node.parentElement) {
    const paint = getComputedStyle(node).backgroundColor;
    if (!/rgba\\(.*, 0\\)/.test(paint)) return light(paint); } return 1; };
  return [...document.querySelectorAll('p, figcaption, h1, h2, h3, label, button, td, th, a, span.label, span.value')]
    .filter((node) => node.offsetParent && node.textContent.trim() && !node.disabled)
    .map((node) => { const [a, b] = [light(getComputedStyle(node).color), ground(node)];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.textContent.trim().slice(0, 30)]; });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright in this environment: python -m pip install playwright"
    )
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Page:
    """One page of the service, and everything that went wrong on it."""

    def __init__(self, browser: Any, service: Running, path: str = "/", **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.troubles: list[str] = []
        here = f"http://127.0.0.1:{service.port}"
        note = self.troubles.append
        self.page.on("console", lambda said: note(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: note(str(error)))
        self.page.on(
            "request",
            lambda asked: None if asked.url.startswith((here, "data:", "blob:")) else note(asked.url),
        )
        self.page.goto(here + path)
        self.page.wait_for_selector("html[data-ready=yes]")

    def show(self, data: bytes, name: str = "picture.png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})
        self.shown()

    def shown(self) -> None:
        self.page.wait_for_selector("html[data-shown=yes]", timeout=120_000)

    def seek(self, share: float) -> None:
        self.page.evaluate(
            """(t) => { const e = document.getElementById('time'); e.value = 1000 * t;
              e.dispatchEvent(new Event('input')); }""",
            share,
        )

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def painted(self, selector: str) -> int:
        """How many colours a canvas shows."""
        script = """(s) => { const c = document.querySelector(s);
          const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          return new Set(new Uint32Array(d.buffer)).size; }"""
        return int(self.page.evaluate(script, selector))

    def close(self) -> None:
        assert self.troubles == []
        self.page.close()


def test_a_picture_is_answered_explained_and_told(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    data = picture(1, (64, 64))
    page.show(data)
    best = service.predict(data).json["results"][0]["predictions"]
    assert page.text("#verdict").startswith(f"first says {best[0]['label']}, ")
    shown = [node.inner_text().split("\n") for node in page.page.locator("#answers li").all()]
    assert [(name, value) for name, value in shown] == [
        (guess["label"], f"{100 * guess['score']:.{2 if guess['score'] < 0.0095 else 1}f} %")
        for guess in best
    ]
    scenes = []
    for share in (0.02, 0.2, 0.35, 0.48, 0.7, 0.8, 1.0):
        page.seek(share)
        scenes.append(page.text("#scene"))
        assert page.painted("#stage") > 10
    assert len(set(scenes)) == 7
    assert "4 × 4 patches of 8 × 8" in scenes[1] and best[0]["label"] in scenes[-1]
    assert page.page.locator("#steps tr").count() > 8
    page.close()


def test_methods_and_classes_are_switched_and_scored(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    page.show(picture(2, (64, 64)))
    assert "relevance for" in page.text("#reasons")
    with page.page.expect_response(lambda answer: "/explain" in answer.url and "gradcam" in answer.url):
        page.page.select_option("#method", "gradcam")
    page.page.wait_for_selector("#reasons h3:has-text('gradcam')")
    page.page.select_option("#class", str(LABELS.index("elk")))
    page.page.wait_for_selector("#reasons h3:has-text('elk')")
    assert page.page.locator("#reasons table").count() == 0
    page.page.click("#measure")
    page.page.wait_for_selector("#reasons table", timeout=120_000)
    assert page.page.locator("#reasons tbody tr").count() >= 2
    page.page.select_option("#method", "rollout")
    page.page.wait_for_selector("#reasons h3:has-text('knows no classes')")
    page.close()


def test_a_class_whose_name_is_another_ones_number_is_explained(
    browser: Any, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in service.backend.slots.values():
        monkeypatch.setattr(slot.version.served, "labels", ("1", "2", "3", "4", "5"))
        monkeypatch.setattr(slot.version.served.explainer(), "labels", ["1", "2", "3", "4", "5"])
    page = Page(browser, service)
    page.page.select_option("#beside", "second")
    page.show(picture(2, (64, 64)))
    for index in (2, 1, 3):
        with page.page.expect_response(
            lambda answer: "/explain" in answer.url and "second" in answer.url
        ) as beside:
            with page.page.expect_response(
                lambda answer: "/explain" in answer.url and "first" in answer.url
            ) as first:
                page.page.select_option("#class", str(index))
        for answer in (first.value, beside.value):
            assert answer.json()["index"] == index
    page.close()


def test_two_models_stand_side_by_side(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    page.page.select_option("#beside", "second")
    page.show(picture(3, (64, 64)))
    assert "first says" in page.text("#verdict") and "second says" in page.text("#verdict")
    assert "agree" in page.text("#verdict")
    assert page.page.locator("#answers .bars").count() == 2
    assert page.page.locator("#reasons figure").count() == 2
    page.close()


def test_boxes_and_masks_are_drawn_beside_classes(
    browser: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("quick_detr_nano", "setr_naive_nano"):
        torch.manual_seed(0)
        model = vitrail.create_model(name, num_classes=3, img_size=(64, 64))
        if name == "quick_detr_nano":
            torch.nn.init.constant_(model.head.linear.bias, 0.3)  # sure enough of its boxes to tell them
        model.save_pretrained(tmp_path / name)
    dense = [str(tmp_path / name) for name in ("setr_naive_nano", "quick_detr_nano")]
    with running(dense[0], str(folders[0]), dense[1]) as service:
        page = Page(browser, service)
        page.show(picture(3, (64, 80)))
        assert "sees mostly" in page.text("#verdict") and not page.page.locator("#story").is_visible()
        assert page.text("#what") == "region of" and "for class" in page.text("#reasons h3")
        assert page.painted("figure.found canvas") > 4
        assert page.page.locator("#answers .chip:visible").count() == page.page.locator("#answers li").count()
        page.page.select_option("#beside", "first")
        page.page.wait_for_selector("#reasons h3:has-text('first')")
        page.page.wait_for_selector("#stage")
        assert "agree" not in page.text("#verdict")
        page.page.select_option("#model", "quick_detr_nano")
        page.page.wait_for_selector("#answers h3:has-text('quick_detr_nano')")
        page.page.wait_for_selector("#reasons h3:has-text('for the box of class')")
        page.shown()
        assert "finds" in page.text("#verdict") and page.text("#what") == "box"
        assert page.page.locator("#reasons figure").count() == 2
        with page.page.expect_download() as download:
            page.page.click("figure.found .save")
        assert download.value.suggested_filename == "quick_detr_nano-found-1.png"
        page.close()


def test_the_story_of_either_model_is_told(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    page.page.select_option("#beside", "second")
    page.show(picture(3, (64, 64)))
    page.seek(1.0)
    before = page.text("#scene")
    with page.page.expect_response(lambda answer: "/story" in answer.url and "second" in answer.url):
        page.page.select_option("#whose", "second")
    page.page.wait_for_function(
        "(before) => document.getElementById('scene').textContent !== before", arg=before
    )
    page.close()


DRAWN = """([canvas, slider, value]) => {
  const kept = CanvasRenderingContext2D.prototype.drawImage, drawn = [];
  CanvasRenderingContext2D.prototype.drawImage = function (image, ...places) {
    if (this.canvas.id === canvas) drawn.push([image instanceof HTMLImageElement, ...places]);
    return kept.call(this, image, ...places);
  };
  const e = document.getElementById(slider); e.value = value; e.dispatchEvent(new Event('input'));
  CanvasRenderingContext2D.prototype.drawImage = kept;
  return drawn;
}"""


@pytest.mark.parametrize(("side", "several"), [(64, 1), (128, 2)])
def test_the_story_cuts_the_windows_that_the_network_reads(
    browser: Any, tmp_path: Path, side: int, several: int
) -> None:
    """PVT v2's are 7 × 7, one every 4 pixels, and begin 3 before the picture; a fine grid goes several at a time."""
    torch.manual_seed(0)
    model = vitrail.create_model("pvt_v2_b0", num_classes=len(LABELS), img_size=(side, side))
    wanted = dataclasses.replace(model.card.preprocessing, input_size=(side, side))
    model.card = dataclasses.replace(model.card, labels=LABELS, preprocessing=wanted)
    model.save_pretrained(tmp_path / "pvt")
    with running(str(tmp_path / "pvt")) as service:
        page = Page(browser, service)
        page.show(picture(3, (side, side)))
        whole = page.page.evaluate(DRAWN, ["stage", "time", 50])
        assert [len(places) for _, *places in whole] == [4]  # one picture, and nothing cut of it yet
        step, long = 4 * several, 7 + 4 * (several - 1)
        pieces = [
            [column * step - 3, row * step - 3, long, long]
            for row in range(side // step)
            for column in range(side // step)
        ]
        begun, cut = (
            page.page.evaluate(DRAWN, ["stage", "time", 101]),
            page.page.evaluate(DRAWN, ["stage", "time", 235]),
        )
        assert [places[:4] for _, *places in begun] == [places[:4] for _, *places in cut] == pieces
        assert f"{side // 4} × {side // 4} windows of 7 × 7 pixels, one every 4 pixels" in page.text("#scene")
        # At first each lies over its own pixels, as large as those are drawn; at last none touches another.
        x, y, shown, _ = whole[0][1:]
        zoom = shown / side
        for (left, top, wide, _), (_, *places) in zip(pieces, begun, strict=True):
            assert places[4:6] == pytest.approx([x + left * zoom, y + top * zoom], abs=0.5)
            assert places[6] == pytest.approx(wide * zoom, abs=0.5)
        across = [places[4:] for _, *places in cut[: side // step]]
        assert all(one[0] + one[2] < other[0] for one, other in itertools.pairwise(across))
        # A layer's cells lie where the attention's do: stage 1 begins 1.5 pixels before the picture.
        (first,) = [
            places for _, *places in page.page.evaluate(DRAWN, ["stage", "time", 601]) if places[:2] == [0, 0]
        ]
        assert first[6:8] == pytest.approx([2.5 * zoom, 2.5 * zoom], abs=1)
        # Attention is laid over the whole picture too: the outermost cells go on to its border.
        laid = [
            places[4:] for image, *places in page.page.evaluate(DRAWN, ["looks", "layer", 0]) if not image
        ]
        wide, high = page.page.evaluate(
            "(({width, height}) => [width, height])(document.getElementById('looks'))"
        )
        assert (min(x for x, *_ in laid), min(y for _, y, *_ in laid)) == (0, 0)
        assert (max(x + w for x, _, w, _ in laid), max(y + h for _, y, _, h in laid)) == (wide, high)
        page.close()


def test_patches_are_looked_at_by_mouse_and_keyboard(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    page.show(picture(4, (64, 64)))
    page.page.locator("#patches").scroll_into_view_if_needed()
    area = page.page.locator("#patches").bounding_box()
    page.page.mouse.move(area["x"] + 5, area["y"] + 5)
    assert page.text("#looks-words").startswith("Row 1, column 1")
    page.page.mouse.click(area["x"] + area["width"] - 5, area["y"] + 5)
    page.page.mouse.move(area["x"] + 5, area["y"] + 5)
    assert page.text("#looks-words").startswith("Row 1, column 4")
    page.page.focus("#patches")
    page.page.keyboard.press("ArrowDown")
    assert page.text("#looks-words").startswith("Row 2, column 4")
    assert "row 2, column 4" in page.page.text_content("#told")
    page.page.keyboard.press("-")
    assert page.text("#layer-name") == "1 of 2"
    page.page.select_option("#head", "2")
    page.page.click("#tokens button")
    assert page.text("#looks-words").startswith("The class token attends")
    assert page.painted("#looks") > 4
    page.close()


def test_pictures_are_dropped_and_pasted(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    script = """([text, kind]) => {
      const data = new DataTransfer(), bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      data.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
      const event = kind === 'drop' ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
        : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});
      document.getElementById('drop').dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        page.page.evaluate(script, [base64.b64encode(picture(5)).decode(), kind])
        page.shown()
        assert "says" in page.text("#verdict")
        page.page.evaluate("delete document.documentElement.dataset.shown")
    page.close()


def test_everything_drawn_can_be_saved(browser: Any, service: Running, tmp_path: Path) -> None:
    page = Page(browser, service, accept_downloads=True)
    page.show(picture(6, (64, 64)))
    page.seek(0.7)
    names = set()
    for button in page.page.locator("button.save:visible").all():
        with page.page.expect_download() as download:
            button.click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        names.add(path.name)
        assert path.suffix == ".json" or path.read_bytes().startswith(b"\x89PNG")
    assert names == {"first.json", "first-relevance.png", "first-story.png", "first-patches.png",
                     "first-attends-to.png", "first-attended-by.png"}  # fmt: skip
    page.close()


def test_a_refusal_is_told_in_words(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    wrong = {
        "no picture of these": (b"GIF89a" + b"\0" * 40, "JPEG, PNG or WebP"),
        "a text called picture.png": (b"no picture\n" * 100, "JPEG, PNG or WebP"),
        "cut off": (picture(7)[:300], "damaged or cut off"),
        "a file that is too large": (picture(7) + bytes(5 * 2**20), "larger than this service takes"),
        "empty": (b"", "no picture"),
    }
    for data, words in wrong.values():
        page.show(picture(7))
        assert page.text("#status") == "" and page.page.locator("#verdict").is_visible()
        page.page.set_input_files("#file", {"name": "picture.png", "mimeType": "image/png", "buffer": data})
        page.page.wait_for_selector(f"#status:has-text('{words}')")
        # Answers and reasons of the picture before would be read as this one's.
        assert not page.page.locator("#results").is_visible()
        # Nor is a frame shown of what the browser cannot draw either; half a PNG it can.
        assert page.page.locator("#preview").is_visible() == data.startswith(b"\x89PNG")
    # The browser itself writes down that an answer was a refusal.
    page.troubles = [trouble for trouble in page.troubles if not re.search("41[35]|422|400", trouble)]
    page.close()


def test_a_service_that_has_gone_is_told(browser: Any, folders: tuple[Path, Path]) -> None:
    with running(str(folders[0])) as service:
        page = Page(browser, service)
        page.show(picture(7))
    page.page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": picture(8)})
    page.page.wait_for_selector("#status:has-text('Is it still running?')")
    assert not page.page.locator("#results").is_visible()
    assert all("ERR_CONNECTION" in trouble for trouble in page.troubles)
    page.page.close()


@pytest.mark.parametrize("width", [320, 390])
def test_a_long_name_of_a_model_has_room_on_a_phone(
    browser: Any, folders: tuple[Path, Path], width: int
) -> None:
    with running(f"vit_tiny_patch16_224.imagenette-and-then-some={folders[0]}") as service:
        page = Page(browser, service, viewport={"width": width, "height": 800})
        page.show(picture(9, (64, 64)))
        assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.close()


def test_all_is_reached_by_keyboard_and_named(browser: Any, service: Running) -> None:
    page = Page(browser, service)
    page.show(picture(8))
    page.page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.page.keyboard.press("Tab")
        reached.add(
            page.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        )
    wanted = {
        "choose",
        "shoot",
        "model",
        "beside",
        "method",
        "class",
        "measure",
        "play",
        "time",
        "layer",
        "head",
        "patches",
        "theme",
    }
    assert wanted <= reached
    unnamed = page.page.evaluate("""() =>
      [...document.querySelectorAll('button, select, input:not([hidden]), canvas, img')]
      .filter((node) => node.offsetParent).filter((node) => !(node.textContent.trim() || node.labels?.length || node.alt
        || node.getAttribute('aria-label') || node.getAttribute('aria-labelledby'))).map((node) => node.outerHTML)""")
    assert unnamed == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_can_be_read_on_phone_and_desktop(browser: Any, service: Running, scheme: str, width: int) -> None:
    page = Page(browser, service, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.show(picture(9, (64, 64)))
    page.seek(1.0)
    low = [entry for entry in page.page.evaluate(CONTRAST) if entry[0] < 4.5]
    assert low == []
    assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.page.click("#theme")
    assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


def test_who_wants_no_motion_gets_none(browser: Any, service: Running) -> None:
    page = Page(browser, service, reduced_motion="reduce")
    page.show(picture(10))
    assert page.page.input_value("#time") == "1000"
    page.close()


def test_the_list_of_routes_is_drawn_from_the_openapi_file(browser: Any, service: Running) -> None:
    page = Page(browser, service, "/docs")
    titles = [node.inner_text() for node in page.page.locator("article h2").all()]
    assert "POST /predict" in titles and "POST /v2/models/{name}/infer" in titles
    examples = dict(
        zip(titles, (node.inner_text() for node in page.page.locator("article pre").all()), strict=True)
    )
    assert "two.png" in examples["POST /predict"] and "two.png" not in examples["POST /explain"]
    page.close()


@pytest.mark.skipif(
    "VITRAIL_PICTURES" not in os.environ, reason="VITRAIL_PICTURES=FOLDER MODEL PICTURE renews them"
)
def test_pictures_for_the_docs(browser: Any) -> None:
    folder, model, file = os.environ["VITRAIL_PICTURES"].split()
    with running(model) as service:
        for scheme, name in (("light", "page"), ("dark", "page-dark")):
            page = Page(browser, service, viewport={"width": 1100, "height": 900}, color_scheme=scheme)
            page.show(Path(file).read_bytes())
            page.page.click("#measure")
            page.page.wait_for_selector("#reasons table", timeout=120_000)
            page.seek(0.78 if scheme == "light" else 0.3)
            page.page.screenshot(path=f"{folder}/{name}.png", full_page=True)
            page.close()
