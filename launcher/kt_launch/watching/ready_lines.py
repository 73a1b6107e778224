"""The lines printed with `ready:`: the ids to request, a sample request, how to chat, how to stop, where the log is. At
most 80 columns, unless a path or a name is longer by itself.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

from kt_launch.runs.runs import run_word
from kt_launch.watching.client import server_url
from kt_model.errors import command
from kt_model.plan import LaunchPlan, served_ids
from kt_model.redaction import FILE_REFERENCE, REFERENCE

WIDTH = 80
API_KEY = "server.api_key"
LABELS = ("ready:", "ask:", "curl:", "chat:", "page:", "stop:", "log:")
GAP = 7
"""Columns of a label and its gap."""
QUESTION = "Hello"


def ready_lines(
    plan: LaunchPlan, run_folder: Path, by_ctrl_c: bool, page: str | None = None, log: str = "server.log"
) -> Iterator[str]:
    """by_ctrl_c: whether a person's Ctrl-C reaches it; page: the playground's address; log: its path in the run
    folder."""
    run = run_word(run_folder)
    yield f"ready: {server_url(plan)}"
    yield from _folded("ask:", ", ".join(served_ids(plan)))
    yield from _curl(plan)
    yield f"{'chat:':<{GAP}}{command('chat', run)}"
    if page:
        yield f"{'page:':<{GAP}}{page}"
    yield f"{'stop:':<{GAP}}{'Ctrl-C, or ' if by_ctrl_c else ''}{command('stop', run)}"
    yield f"{'log:':<{GAP}}{run_folder / log}"


def _folded(label: str, text: str) -> list[str]:
    gap = " " * GAP
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{GAP}}", subsequent_indent=gap, break_long_words=False
    ) or [label]


def _curl(plan: LaunchPlan) -> Iterator[str]:
    """A question to the last id, which is an adapter's if there is one."""
    name = served_ids(plan)[-1].replace("'", "'\\''")
    messages = f'"messages": [{{"role": "user", "content": "{QUESTION}"}}]'
    yield f"{'curl:':<{GAP}}curl {server_url(plan)}/v1/chat/completions \\"
    if key := _key(plan):
        yield f"{' ' * GAP}-H {key} \\"
    yield f"{' ' * GAP}-H 'Content-Type: application/json' \\"
    yield f'{" " * GAP}-d \'{{"model": "{name}",'
    yield f"{' ' * GAP}     {messages}}}'"


def _key(plan: LaunchPlan) -> str:
    """The header with the key as a shell would read it, never the key itself."""
    reference = str(plan.value(API_KEY)) if API_KEY in plan.resolved else ""
    if reference.startswith(REFERENCE):
        return f'"Authorization: Bearer ${reference.removeprefix(REFERENCE)}"'
    if reference.startswith(FILE_REFERENCE):
        return f'"Authorization: Bearer $(cat {shlex.quote(reference.removeprefix(FILE_REFERENCE))})"'
    return ""
