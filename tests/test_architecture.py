"""The layers: every import of every file, compared with the table of docs/decisions/001."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1] / "vitrail"
FILES = sorted(ROOT.rglob("*.py"))

BASE = {"errors", "config", "disk"}
SHARED = BASE | {"tasks", "runtime", "data", "weights", "nn.shapes", "models"}

# Part -> what it may import besides itself and the outside world.
TABLE: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "disk": {"errors"},
    "runs": set(),
    "nn": {"errors"},
    "tasks": BASE | {"nn.shapes"},
    "weights": BASE,
    "data": BASE | {"weights.card"},
    "runtime": BASE,
    "models": BASE | {"nn", "weights"},
    "engines": SHARED | {"export"},
    "evaluate": SHARED,
    "predict": SHARED | {"engines"},
    "train": SHARED | {"evaluate"},
    "explain": SHARED | {"engines", "nn"},
    "export": SHARED,
    "jobs": SHARED | {"runs", "nn", "engines", "evaluate", "predict", "train", "explain", "export"},
    "cli": BASE | {"runs", "jobs", "serve"},
    "serve": BASE | {"runs", "jobs", "tasks"},
    "__main__": {"cli"},
}

# Looked up by name on first use, never when vitrail is imported.
FRONT_DOOR = "__init__"


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Modules of vitrail that a file imports at run time, without the leading `vitrail.`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the layer"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module else set()
    return {name.removeprefix("vitrail.") for name in found if name.startswith("vitrail.")}


def allowed(part: str, module: str) -> bool:
    """Whether a part may import a module, or a name in a module."""
    if module == part or module.startswith(part + "."):
        return True
    return any(module == way or module.startswith(way + ".") for way in TABLE[part])


def test_a_file_imports_only_what_stands_below_it() -> None:
    wrong = []
    for file in FILES:
        part = part_of(file)
        if part == FRONT_DOOR:
            continue
        assert part in TABLE, f"{part} has no place in the table of layers"
        # `from vitrail.nn import shapes` shows as nn and nn.shapes; the whole name decides.
        modules = imports(file)
        modules = {name for name in modules if not any(other.startswith(name + ".") for other in modules)}
        wrong += [f"{file.relative_to(ROOT)}: {name}" for name in modules if not allowed(part, name)]
    assert not wrong


def test_no_family_imports_another() -> None:
    tree = ast.parse((ROOT / "models" / "registry.py").read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAMILIES"
    )
    assert isinstance(table, ast.Dict)
    families = {str(ast.literal_eval(value)).removeprefix("vitrail.") for value in table.values}
    for family in families:
        file = ROOT / (family.replace(".", "/") + ".py")
        taken = {
            name for name in imports(file) for other in families - {family} if name.startswith(other + ".")
        }
        assert not taken, f"{family} imports {taken}: what two families share belongs to nn"


def names_in(tree: ast.AST) -> set[str]:
    """Modules imported and dotted names used."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


def offenders(parts: set[str], offends: Callable[[ast.AST], object]) -> list[str]:
    """Files outside the given parts in whose tree something offends."""
    rest = [file for file in FILES if part_of(file) not in parts]
    return [
        str(file.relative_to(ROOT)) for file in rest if offends(ast.parse(file.read_text(encoding="utf-8")))
    ]


def test_only_runtime_touches_torch_distributed() -> None:
    def offends(tree: ast.AST) -> bool:
        return any(name.startswith("torch.distributed") for name in names_in(tree))

    assert not offenders({"runtime"}, offends)


def test_the_environment_is_read_by_jobs_and_the_command_line_only() -> None:
    read = {"os.environ", "os.getenv", "sys.argv"}
    assert not offenders({"cli", "serve", "jobs", "runtime"}, lambda tree: names_in(tree) & read)


def test_only_the_command_line_prints() -> None:
    def prints(tree: ast.AST) -> bool:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        return any(isinstance(call, ast.Name) and call.id == "print" for call in calls)

    assert not offenders({"cli"}, prints)


def test_nothing_is_left_for_later() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "raise NotImplementedError")
    assert not [file for file in FILES for mark in marks if mark in file.read_text(encoding="utf-8")]
