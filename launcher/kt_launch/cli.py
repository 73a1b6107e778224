"""kt-launch: reads the command line, composes the config, runs the action. The whole launch is on this page.

Hydra does the composing and the multirun; main, errors and exit codes are our own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
import traceback
from typing import TYPE_CHECKING, Any

from kt_launch.commandline.terminal import folded, print_mistakes
from kt_launch.config.secrets import hide_config
from kt_launch.machine.folders import check_own_folders
from kt_launch.machine.limits import address_space_bytes, read_limits
from kt_launch.machine.streams import OutputGone, finish, guarded_streams
from kt_model.errors import EXIT_INTERRUPTED, EXIT_OK, LaunchError, LaunchErrors, Problems, errors_of
from kt_model.printable import say
from kt_model.redaction import hide_typed
from kt_model.system_errors import in_users_words, launch_error_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kt_launch.actions import Job
    from kt_launch.commandline.arguments import Arguments
    from kt_launch.config.compose import Composed, Composer


LEAST_ADDRESSES = 512 << 20


def main(argv: list[str] | None = None) -> int:
    """The console script. A user's mistake is one line and an exit code; a bug of ours is a traceback."""
    gc.disable()  # imports create almost no garbage, and collecting it would take a tenth of the start
    with guarded_streams():
        try:
            return _run_to_its_end(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except OutputGone as gone:
            return EXIT_INTERRUPTED if gone.terminal else EXIT_OK


def _run_to_its_end(argv: list[str]) -> int:
    """The exit code, once all output has been written."""
    try:
        with in_users_words():
            _require_addresses()
            _spare_threads()
            from kt_launch.commandline.arguments import read_arguments

            code = launch(read_arguments(hide_typed(argv)))
            finish(sys.stdout)
            return code
    except (LaunchError, LaunchErrors) as failure:
        return _tell(failure)


def _require_addresses() -> None:
    """Below this, libraries that every command imports abort the process with their own messages."""
    limit = address_space_bytes()
    if limit is not None and limit < LEAST_ADDRESSES:
        takes = f"kt-launch itself takes up to {LEAST_ADDRESSES >> 20} MiB"
        problem = f"{limit >> 20} MiB of addresses are too few: {takes}"
        raise LaunchError("ulimit -v", problem, "Run ulimit -v unlimited first.")


def _spare_threads() -> None:
    """numpy's library starts a thread per CPU when it is loaded, and ends the process if it may not; we need none."""
    left = read_limits().threads_left
    if left is not None and left < (os.cpu_count() or 1):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _tell(failure: LaunchError | LaunchErrors) -> int:
    """The exit code is returned even if nobody reads the line any more."""
    with contextlib.suppress(OutputGone, OSError):
        print_mistakes(failure)
    return failure.exit_code


def launch(arguments: Arguments) -> int:
    """One job, or with -m one after another; returns the exit code of the worst."""
    if arguments.help or arguments.version or arguments.completion:
        return show_page(arguments)
    from kt_launch.config.compose import Composer

    composer = Composer(arguments.config_dir)
    problems = Problems()
    overrides = composer.check(arguments.overrides, arguments.multirun, problems)
    if arguments.multirun:
        problems.raise_if_any()
        from kt_launch.sweeps.run import run_sweep

        return run_sweep(composer, overrides, run_job)
    composed = compose_one(composer, overrides, problems)
    if arguments.show_config:
        problems.raise_if_any()
        return show_config(composed)
    return run_composed(composed, problems, None, {})


def compose_one(composer: Composer, overrides: list[str], problems: Problems) -> Composed:
    """One job's config; mistakes found earlier are reported together with those of composing."""
    try:
        return composer.compose(overrides)
    except (LaunchError, LaunchErrors) as failure:
        raise LaunchErrors([*problems.errors, *errors_of(failure)]) from failure


def run_job(config: DictConfig) -> dict[str, Any]:
    """One job of a multirun, possibly in another process. It always leaves a row, unless Ctrl-C ends the whole
    sweep."""
    from kt_launch.config.compose import is_search, job_number, read_composed, sweep_folder, typed_overrides
    from kt_launch.sweeps.run import SweepJob

    number = job_number() or 0
    job_row = SweepJob(sweep_folder(), number, typed_overrides(), is_search())
    record: dict[str, Any] = {"exit_code": 1}
    try:
        composed = read_composed(config)
        if kept := job_row.kept_row(composed.raw):
            return kept
        say(f"job {number}: {shlex.join(composed.overrides)}", file=sys.stderr)
        record["exit_code"] = run_composed(composed, Problems(), number, record)
    except (LaunchError, LaunchErrors) as failure:
        print_mistakes(failure)
        record.update(exit_code=failure.exit_code, error=str(failure))
    except SystemExit as ended:
        record["exit_code"] = ended.code if isinstance(ended.code, int) else 1
    except Exception as bug:
        known = launch_error_of(bug)
        if known is not None:
            _tell(known)
            record.update(exit_code=known.exit_code, error=str(known))
        else:
            traceback.print_exc()
            record["error"] = repr(bug)
    row = job_row.leave_row(record)
    if row["exit_code"] == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return row


def run_composed(composed: Composed, problems: Problems, number: int | None, record: dict[str, Any]) -> int:
    """Validate, then run the action; mistakes found so far are reported together with the action's own."""
    from kt_launch.actions import run_action

    gc.freeze()  # imported modules stay, so they need not be scanned again
    gc.enable()
    job = validated(composed, problems)
    job.number, job.record = number, record
    try:
        return run_action(job)
    except LaunchErrors as failure:
        raise LaunchErrors([job.sources.in_config_file(mistake) for mistake in failure.errors]) from failure


def validated(composed: Composed, problems: Problems) -> Job:
    """The job of a composed config; its mistakes are added to the others."""
    from kt_launch.actions import Job
    from kt_launch.config.validation import validate

    config, mistakes = validate(composed.raw)
    for mistake in mistakes:
        problems.add_error(composed.sources.in_its_file(mistake))
    if config.action.name != "doctor":  # which reports it itself
        check_own_folders(config.paths.runs, problems)
    return Job(hide_config(config), composed.sources, problems, composed.overrides)


def show_page(arguments: Arguments) -> int:
    """The help for everything or for one action, the version, or a completion script: none of them composes a
    config."""
    from kt_launch.commandline.completion import completion_script
    from kt_launch.commandline.help import help_page
    from kt_launch.config.presets import config_folders, read_groups
    from kt_model.installed import product

    if arguments.version:
        print(product())
        return EXIT_OK
    groups = read_groups(config_folders(arguments.config_dir))
    if action := arguments.action if arguments.help else "":
        from kt_launch.actions.manual import action_help
        from kt_launch.config.actions import ACTIONS, check_action
        from kt_launch.config.schema import read_fields

        if action in dict(read_fields()) and action not in ACTIONS:
            raise LaunchError(
                "help", f"{action} is a key, but an action is expected", f"Type kt-launch explain {action}."
            )
        check_action(action, "kt-launch help ")
        print(folded(action_help(action)))
    else:
        print(folded(help_page(groups)) if arguments.help else completion_script(arguments.completion, groups))
    return EXIT_OK


def show_config(composed: Composed) -> int:
    """The composed config, validated but not resolved."""
    import yaml

    from kt_launch.config.validation import validate

    _, mistakes = validate(composed.raw)
    if mistakes:
        raise LaunchErrors([composed.sources.in_its_file(mistake) for mistake in mistakes])

    print(yaml.safe_dump(composed.raw, sort_keys=False), end="")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
