"""What a user sees when something is wrong: one line, *where: what is wrong; what to do*, and an exit code.

A LaunchError is for the user to fix and never shows a traceback; every other exception is a bug of ours and does.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence

EXIT_OK = 0
EXIT_CONFIGURATION = 2
EXIT_NOT_STARTED = 3
EXIT_PROOF_FAILED = 4
EXIT_BENCH_FAILED = 5
EXIT_TOO_LONG = 124
"""As coreutils' timeout does."""
EXIT_INTERRUPTED = 130
SHOWN = 3
"""Names of a kind listed in one message."""


class LaunchError(Exception):
    """One mistake: where it is (a key, a file), what is wrong and what was expected, and what to do about it."""

    exit_code = EXIT_CONFIGURATION

    def __init__(self, where: str, problem: str, fix: str = "") -> None:
        super().__init__(where, problem, fix)
        self.where = where
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        line = f"{self.where}: {self.problem}"
        return f"{full_stop(line)} {self.fix}" if self.fix else line


def full_stop(text: str) -> str:
    """A sentence with its full stop, which log lines may already have."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def shown(names: Sequence[str], most: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def quoted(override: str) -> str:
    """As it is typed in a shell."""
    if re.search(r'["$`\\!]', override):  # these act between double quotes, too
        return shlex.quote(override)
    return f'"{override}"' if re.search(r"[^\w=./,:@%+-]", override) else override


def command(*words: str) -> str:
    """kt-launch with these words, as it is typed in a shell: the action first, by its name alone."""
    return shlex.join(["kt-launch", *words])


class ServerDidNotStart(LaunchError):
    """The server process ended or stayed silent before it could answer."""

    exit_code = EXIT_NOT_STARTED


class ProofFailed(LaunchError):
    """The server answers, but not with what was asked for."""

    exit_code = EXIT_PROOF_FAILED


class BenchFailed(LaunchError):
    """The server answers, but it could not be measured."""

    exit_code = EXIT_BENCH_FAILED


class LaunchErrors(Exception):
    """Several mistakes of one configuration, shown together."""

    def __init__(self, errors: list[LaunchError]) -> None:
        super().__init__(*errors)
        self.errors = errors

    @property
    def exit_code(self) -> int:
        return max(error.exit_code for error in self.errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def errors_of(failure: LaunchError | LaunchErrors) -> list[LaunchError]:
    """One mistake or several as a list."""
    return failure.errors if isinstance(failure, LaunchErrors) else [failure]


class Problems:
    """Collects mistakes, so that a user can fix them all at once."""

    def __init__(self) -> None:
        self.errors: list[LaunchError] = []
        self._explained: set[str] = set()

    def add(self, where: str, problem: str, fix: str = "") -> None:
        self.add_error(LaunchError(where, problem, fix))

    def add_error(self, error: LaunchError) -> None:
        if not any(error.where == name or error.where.startswith(f"{name}.") for name in self._explained):
            self.errors.append(error)

    def explained(self, where: str) -> None:
        """Note that a mistake already shown is the cause of all later ones at `where`."""
        self._explained.add(where)

    @contextlib.contextmanager
    def collect(self, key: str = "") -> Iterator[None]:
        """Collect mistakes raised in the block, and go on after it; a mistake about a file is prefixed with the key."""
        try:
            yield
        except (LaunchError, LaunchErrors) as failure:
            for error in errors_of(failure):
                self.add_error(_told_of(key, error))

    def raise_if_any(self) -> None:
        if self.errors:
            raise LaunchErrors(self.errors)


def _told_of(key: str, error: LaunchError) -> LaunchError:
    """The same mistake under the key that names the file."""
    if not key or error.where.startswith(key.partition(".")[0]):
        return error
    return LaunchError(key, f"{error.where}: {error.problem}", error.fix)
