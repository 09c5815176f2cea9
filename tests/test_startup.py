"""Help comes at once: nothing heavy is imported before a command is chosen and run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitrail.cli.main import COMMANDS

HEAVY = (
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "rich",
    "matplotlib",
    "scipy",
    "sklearn",
    "transformers",
    "timm",
)

PROBE = """
import sys
{do}
heavy = [name for name in {heavy!r} if name in sys.modules]
assert not heavy, heavy
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def probe(do: str) -> None:
    done = python(PROBE.format(do=do, heavy=HEAVY))
    assert done.returncode == 0, done.stderr


def test_importing_vitrail_imports_nothing_heavy() -> None:
    probe("import vitrail; assert dir(vitrail)")


@pytest.mark.parametrize("module", ["errors", "config", "runs", "cli.main"])
def test_the_records_need_no_torch(module: str) -> None:
    probe(f"import vitrail.{module}")


def test_help_of_every_command_imports_nothing_heavy() -> None:
    lines = [["--help"], ["--version"], *([*command.name.split(), "--help"] for command in COMMANDS)]
    probe(f"from vitrail.cli.main import main\nfor line in {lines!r}: assert main(line) == 0, line")


def test_a_mistyped_command_or_flag_imports_nothing_heavy() -> None:
    lines = [["trian"], ["train", "digits", "--epoch", "3"], ["predict"], ["train", "digits", "--lr", "nan"]]
    probe(f"from vitrail.cli.main import main\nfor line in {lines!r}: assert main(line) == 2, line")


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """0.3 s on a quiet machine; the best of several, measured against Python's own start, on a busy one."""

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], capture_output=True, check=True, cwd=Path(__file__).parents[1]
        )
        return time.perf_counter() - start

    times = [(seconds("-m", "vitrail", "--help"), seconds("-c", "pass")) for _ in range(5)]
    best, bare = (min(column) for column in zip(*times, strict=True))
    assert best < 0.3 + 5 * bare, f"vitrail --help took {best:.2f} s, Python alone {bare:.2f} s"
