"""The outermost edge of a launcher process: turns whatever ended a run into an exit code and a message on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from kt_launch.machine.streams import OutputGone, guarded_streams, words_may_be_lost
from kt_model.errors import EXIT_INTERRUPTED, EXIT_NOT_STARTED, LaunchError, LaunchErrors, errors_of
from kt_model.printable import say
from kt_model.system_errors import in_users_words


def exit_code_of(run: Callable[[], int], note: Callable[[LaunchError], None] = lambda failure: None) -> int:
    """The exit code of `run`. Mistakes and system errors are printed on stderr, and the first one is passed to `note`,
    whose OSError is ignored. Anything else is a bug of ours, and raised."""
    with guarded_streams(), words_may_be_lost():
        try:
            with in_users_words():
                return run()
        except OutputGone:
            return EXIT_INTERRUPTED
        except (LaunchError, LaunchErrors) as failure:
            with contextlib.suppress(OSError):
                note(errors_of(failure)[0])
            with contextlib.suppress(OutputGone):
                for error in errors_of(failure):
                    say(f"error: {error}", file=sys.stderr)
            return failure.exit_code or EXIT_NOT_STARTED
