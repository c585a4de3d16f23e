"""The errors a person can cause, each saying what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen


class DrivetrainError(Exception):
    """A mistake in what was asked for (not a bug in the engine); the CLI prints it without a traceback and exits with 2, with 1
    for a `RunError`."""


class PluginError(DrivetrainError):
    """A plugin that cannot be found, chosen, imported or registered."""


class DataError(DrivetrainError):
    """A data set or batch that the run cannot use."""


class ModelError(DrivetrainError):
    """A model that does not do what the loop needs of it."""


class RunError(DrivetrainError):
    """A run that failed with nothing wrong in what was asked for (a full disk, numbers that overflow); the CLI exits with 1."""


class PeerFailure(RuntimeError):
    """Another process of the run failed, or is gone or frozen, and this one ends because of it; the message begins with which."""


@frozen
class Problem:
    """One thing wrong with a configuration: `path` is the dotted key ("optimizer.adamw.lr"), `message` what and how to mend it."""

    path: str
    message: str

    def under(self, prefix: str) -> Problem:
        """The same problem seen from one level up."""
        if not prefix or not self.path:
            return Problem(prefix or self.path, self.message)
        separator = "" if self.path.startswith("[") else "."
        return Problem(f"{prefix}{separator}{self.path}", self.message)

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(DrivetrainError):
    """Everything wrong with one configuration, collected in one pass.

    Attributes:
        problems: one entry for each mistake, in the order of the keys.
        source: the file the configuration came from, or "configuration" when it was written in Python.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "configuration") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, in capitals or not, or an empty string when none is near."""
    import difflib  # 6 ms that only an error should cost

    names = {one.casefold(): one for one in sorted(known)}
    near = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=0.6)
    return f" Did you mean {names[near[0]]!r}?" if near else ""
