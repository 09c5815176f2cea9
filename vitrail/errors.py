"""The exceptions that vitrail raises.

    VitrailError                anything that vitrail reports on purpose
    ├── UserError               the caller can fix it; the command line exits with 2
    │   ├── ConfigError         an option, field or flag with a value that is not legal
    │   ├── ModelError          an unknown model, or a part that does not fit the model
    │   ├── WeightsError        a weight file that cannot be read, or does not fit
    │   ├── DataError           a data set that cannot be used as it is
    │   │   └── ImageError      one picture that cannot be read, or may not be
    │   └── UnsupportedError    a pair of things that is not defined together
    ├── TrainingError           a run that cannot go on (losses not finite, a full disk, a dead rank)
    └── ProofError              an export or conversion outside its bounds; exit code 3

A message says what went wrong, what is allowed, what came, and the cure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class VitrailError(Exception):
    """Anything that vitrail reports on purpose."""

    exit_code = 1


class UserError(VitrailError):
    """Something that the caller can fix."""

    exit_code = 2


class ConfigError(UserError):
    """An option, field or flag with a value that is not legal."""


class ModelError(UserError):
    """An unknown model, or a part that does not fit the model."""


class WeightsError(UserError):
    """A weight file that cannot be read, or does not fit the model."""


class DataError(UserError):
    """A data set that cannot be used as it is."""


class ImageError(DataError):
    """One picture that cannot be read, or may not be."""


class UnsupportedError(UserError):
    """Two things that are not defined together, such as a method and a family."""


class TrainingError(VitrailError):
    """A run that cannot go on."""


class ProofError(VitrailError):
    """An export or conversion whose result lies outside its bounds."""

    exit_code = 3


def require(*packages: str, extra: str) -> None:
    """Raise ConfigError where packages are not installed, with the extra of vitrail that brings them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} is not installed, and this needs it: pip install 'vitrail[{extra}]'."
        )


def suggestion(name: str, options: Iterable[str], count: int = 3) -> str:
    """`" Did you mean a, b?"` for the options nearest to a name, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""
