"""The page of each action: `kt-launch help plan` shows it, `python -m kt_launch.actions.manual docs/actions` writes all
of them as Markdown. Their text is PAGE in the action's own file.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kt_launch.actions.page import Page
from kt_launch.config.actions import ACTIONS
from kt_launch.config.schema import meaning_of, read_fields
from kt_model.atomic_file import write_text

WRITTEN_BY = (
    "<!-- Written by `python -m kt_launch.actions.manual docs/actions`; change PAGE in "
    "launcher/kt_launch/actions/{name}.py instead. -->"
)
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
"""A link to another page, which a terminal shows as its name."""


def page_of(name: str) -> Page:
    """PAGE in the action's file."""
    page = importlib.import_module(f"kt_launch.actions.{name}").PAGE
    assert isinstance(page, Page)
    return page


def keys_of(page: Page) -> Iterator[tuple[str, str]]:
    """(key, help) of the keys that the action reads, in the config's order."""
    for key, field in read_fields():
        if any(key == wanted or (wanted.endswith(".") and key.startswith(wanted)) for wanted in page.keys):
            yield key, meaning_of(field)


def action_help(name: str) -> str:
    """The page for the terminal."""
    page = page_of(name)
    width = max(len(command) for command, _ in page.examples)
    examples = [f"  {command:<{width}}  {meaning}".rstrip() for command, meaning in page.examples]
    keys = [f"  {key:<30} {meaning}" for key, meaning in keys_of(page)]
    paragraphs = [part for text in page.text for part in (text, "")]
    parts = [f"kt-launch {name}: {ACTIONS[name]}", "", *paragraphs, "Examples:", *examples]
    if page.data:
        fields = [f"  {field:<20} {meaning}" for field, meaning in page.data.fields]
        parts += ["", f"With --json: {page.data.of}{':' if fields else ''}", *fields]
    return LINK.sub(r"\1 (docs/\2)", "\n".join([*parts, "", "Keys:", *keys] if keys else parts))


def markdown_page(name: str) -> str:
    """The page for docs/actions."""
    page, summary = page_of(name), ACTIONS[name]
    parts = [f"# kt-launch {name}", WRITTEN_BY.format(name=name), f"{summary[0].upper()}{summary[1:]}.", *page.text]
    commands = [f"    {command}" + (f"    # {meaning}" if meaning else "") for command, meaning in page.examples]
    parts.append("\n".join(commands))
    if page.picture:
        parts.append(f"![What kt-launch {name} prints](../pictures/{name}.svg)")
    if page.data:
        fields = [f"| `{field}` | {meaning} |" for field, meaning in page.data.fields]
        parts.append(f"With `--json` it prints {page.data.of}{':' if fields else '.'}")
        parts += ["\n".join(["| field | |", "| --- | --- |", *fields])] if fields else []
    if keys := list(keys_of(page)):
        rows = [f"| `{key}` | {meaning.replace('|', chr(92) + '|')} |" for key, meaning in keys]
        parts.append("\n".join(["| key | |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def index_page() -> str:
    """docs/actions/README.md."""
    rows = [f"| [{name}]({name}.md) | {summary} |" for name, summary in ACTIONS.items()]
    table = "\n".join(["| action | |", "| --- | --- |", *rows])
    same = "`kt-launch NAME` and `kt-launch action=NAME` are the same; `kt-launch help NAME` shows these pages."
    return "\n\n".join(["# Actions", WRITTEN_BY.format(name="<name>"), same, table]) + "\n"


def markdown_files() -> dict[str, str]:
    """File name -> contents of docs/actions."""
    return {"README.md": index_page()} | {f"{name}.md": markdown_page(name) for name in ACTIONS}


def main(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in markdown_files().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
