"""What the README and the guide say to type can be typed; what they point to is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vitrail import runs
from vitrail.cli import flags, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of the shell blocks that call vitrail, without what comes before and behind."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|/|-m )vitrail (.*?)(?:\s+#.*)?$", line) for line in lines]
    return [match[1] for match in found if match]


LINES = [pytest.param(line, id=f"{page.name}: {line}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", LINES)
def test_a_command_that_we_print_is_one_that_we_take(line: str) -> None:
    command, words = main.choose(shlex.split(line))
    record = getattr(runs, command.record)
    program = f"vitrail {command.name}"
    given = flags.read(flags.parser(record, program, command.positional), words)
    if "recipe" in given:
        given = main.recipe(given)
    flags.complete(record, given, program)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_make_targets_that_we_name_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"^make ([a-z- ]+?)\s*(?:#.*)?$", "\n".join(blocks(page, "sh")), re.MULTILINE)
        assert {word for words in named for word in words.split()} <= known, page.name


def test_the_table_of_verbs_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in main.COMMANDS:
        assert f"`vitrail {command.name}" in text or f"make {command.name}" in text, command.name


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks(ROOT / "README.md", "python"):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "model" / "config.json").exists()


def test_every_recipe_is_a_run() -> None:
    from vitrail.config import from_dict, read_toml

    found = sorted((ROOT / "recipes").rglob("*.toml"))
    assert found
    for path in found:
        from_dict(runs.TrainRun, {"data": ["digits"], **read_toml(path)}, where=path.name)


@pytest.mark.slow
def test_make_demo_does_what_the_readme_says(tmp_path: Path) -> None:
    """97 % on digits, and the pictures where it says they are."""
    out = tmp_path / "demo"
    words = [os.fspath(ROOT / ".venv" / "bin" / "python"), "-m", "vitrail", "demo", "--output", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    test = re.search(r"^test\s+([\d.]+) %", done.stdout, re.MULTILINE)
    assert test and float(test[1]) >= 97, done.stdout
    assert (out / "trace" / "trace.png").exists() and (out / "trace" / "trace.html").exists()
