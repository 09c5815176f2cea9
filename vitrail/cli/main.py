"""The command line: one table of commands, and what becomes of errors.

A command names its record and its job; nothing of either is imported before the command is chosen.
Results go to stdout, progress and messages to stderr. Exit codes: 0 success, 1 something failed,
2 an error that the caller can fix, 3 an export or conversion outside its bounds, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vitrail.errors import ConfigError, VitrailError, suggestion


class Command(NamedTuple):
    """One verb: its record in vitrail.runs, and which of the record's fields are arguments without a flag."""

    name: str
    record: str
    positional: tuple[str, ...]
    summary: str

    @property
    def verb(self) -> str:
        """The function in vitrail.cli.verbs that runs the job and shows its result."""
        return self.name.replace(" ", "_")


FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that say: the disk, a quota or the largest size of a file is reached."""

COMMANDS = (
    Command("train", "TrainRun", ("data",), "train a model on a folder, archive or table of images"),
    Command("evaluate", "EvaluateRun", ("model", "data"), "score a model on labelled images"),
    Command("predict", "PredictRun", ("model", "images"), "say what is in images"),
    Command("trace", "TraceRun", ("model", "image"), "show how one image becomes a prediction, step by step"),
    Command(
        "explain", "ExplainRun", ("model", "images"), "show where a model looks, and how far to trust that"
    ),
    Command(
        "inspect", "InspectRun", ("model", "images"), "draw the figures of the papers for your own model"
    ),
    Command("models", "ModelsRun", ("pattern",), "list the networks: parameters, GFLOPs, input size"),
    Command("info", "InfoRun", ("model",), "show the card of a network, model folder or weight file"),
    Command(
        "export", "ExportRun", ("model",), "write a model as ONNX, OpenVINO, torch or for Triton, with proof"
    ),
    Command("convert", "ConvertRun", ("source", "target"), "bring weights from one layout into another"),
    Command("data check", "DataCheckRun", ("data",), "find what is wrong with a data set"),
    Command("bench", "BenchRun", ("model",), "measure speed, memory, parameters and FLOPs"),
    Command(
        "compare", "CompareRun", ("data",), "train families side by side at equal budget; cost against size"
    ),
    Command("serve", "ServeRun", ("models",), "answer over HTTP what is in pictures, and show why on a page"),
    Command("doctor", "DoctorRun", (), "check the installation; each problem with its cure"),
    Command("demo", "DemoRun", (), "train, evaluate, predict and trace on built-in digits, in two minutes"),
)


ELSEWHERE = {
    "eval": "evaluate MODEL DATA",
    "validate": "evaluate MODEL DATA",
    "test": "evaluate MODEL DATA",
    "val": "evaluate MODEL DATA",
    "infer": "predict MODEL IMAGES",
    "inference": "predict MODEL IMAGES",
    "fit": "train DATA",
    "finetune": "train DATA --pretrained MODEL",
    "fine-tune": "train DATA --pretrained MODEL",
    "distill": "train DATA --teacher MODEL",
    "probe": "train DATA --pretrained MODEL --freeze backbone",
    "linear-probe": "train DATA --pretrained MODEL --freeze backbone",
    "knn": "evaluate MODEL DATA --knn LABELLED",
    "visualize": "trace MODEL IMAGE, or explain MODEL IMAGE",
    "benchmark": "bench MODEL",
    "list": "models",
}
"""What other tools call a command."""


def entry() -> None:
    """The `vitrail` command."""
    # File names need not be text; in JSON, \\udcff is the same letter.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    program = "vitrail"
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if arguments[0] in ("-V", "--version"):
            print(f"vitrail {importlib.import_module('vitrail').__version__}")
            return 0
        if arguments[1:2] in (["-h"], ["--help"]) and (several := beginning(arguments[0])):
            print("\n".join(f"vitrail {command.name:<11} {command.summary}" for command in several))
            return 0
        command, rest = choose(arguments)
        program = f"vitrail {command.name}"
        return run(command, rest)
    except BrokenPipeError:
        # The reader of our output has gone (| head): nothing is left to say, nor anyone to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        return _fail(program, *last_words(error))


def last_words(error: BaseException) -> tuple[str, int]:
    """What is said of an error that ends a command, in one line, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        words, code = "interrupted.", 130
    elif isinstance(error, VitrailError):
        words, code = str(error), error.exit_code
    elif isinstance(error, FILE_ERRORS):
        words, code = f"{error.filename or ''}: {error.strerror or error}.", 2
    elif isinstance(error, OSError) and error.errno in FULL:  # writers often do not say which file it was
        where = f"{error.filename}: " if error.filename else ""
        words, code = f"{where}{error.strerror}. Make room, then give the same command again.", 2
    else:
        about = f"unexpected {type(error).__name__}: {error}"
        words, code = f"{about} (VITRAIL_DEBUG=1 shows where; a bug report is welcome).", 1
    return " ".join(words.split()), code


def choose(arguments: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command that the first words name, and the words after it."""
    for count in (2, 1):
        for command in COMMANDS:
            if command.name.split() == list(arguments[:count]):
                return command, arguments[count:]
    names = [command.name for command in COMMANDS]
    if several := beginning(arguments[0]):
        longer = ", ".join(command.name for command in several)
        raise ConfigError(f"{arguments[0]} needs a second word: {longer}.")
    elsewhere = ELSEWHERE.get(arguments[0].lower())
    if elsewhere is not None:
        raise ConfigError(f"There is no command {arguments[0]!r}; here it is: vitrail {elsewhere}.")
    near = suggestion(arguments[0], names) or f" The commands are: {', '.join(names)}."
    raise ConfigError(f"There is no command {arguments[0]!r}.{near}")


def beginning(word: str) -> list[Command]:
    """The commands of two words of which this is the first."""
    return [command for command in COMMANDS if command.name.startswith(f"{word} ")]


def run(command: Command, arguments: Sequence[str]) -> int:
    """Read the flags into the command's record, and run its job."""
    from vitrail.cli import flags

    runs = importlib.import_module("vitrail.runs")
    record: type[Any] = getattr(runs, command.record)
    program = f"vitrail {command.name}"
    parser = flags.parser(record, program, command.positional)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help(), end="")
        return 0
    given = flags.read(parser, arguments)
    if "recipe" in given:
        given = recipe(given)
    verbs = importlib.import_module("vitrail.cli.verbs")
    do: Callable[[Any], int] = getattr(verbs, command.verb)
    return do(flags.complete(record, given, program))


def recipe(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, over what its recipe sets."""
    from vitrail.config import read_toml
    from vitrail.jobs.plan import find_recipe

    path = find_recipe(given["recipe"])
    print(f"recipe: {path}", file=sys.stderr)
    # The name is not handed on: the job would take a flag that equals a default for one that was not given.
    over = {name: value for name, value in given.items() if name != "recipe"}
    told = read_toml(path)
    if "steps" in over or "epochs" in over:  # a run has one length, and the flag says which
        told = {name: value for name, value in told.items() if name not in ("steps", "epochs")}
    return told | over


def overview() -> str:
    """The help page: what there is, one line each."""
    lines = ["usage: vitrail COMMAND ...", "", "Vision Transformers: train, trust, use and see through.", ""]
    lines += [f"  {command.name:<11} {command.summary}" for command in COMMANDS]
    lines += ["", "vitrail COMMAND --help lists a command's flags. Start with: vitrail demo"]
    return "\n".join(lines)


def _fail(program: str, message: str, code: int) -> int:
    if os.environ.get("VITRAIL_DEBUG") and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    print(f"{program}: {message}", file=sys.stderr)
    return code
