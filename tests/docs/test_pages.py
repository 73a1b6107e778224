"""The pages that are written by the code are those of the code as it is, and README's exit codes are all there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kt_launch.actions.doctor import EXIT_FAILED
from kt_launch.actions.manual import keys_of, markdown_files, page_of
from kt_launch.cli import main
from kt_launch.config.actions import ACTIONS
from kt_launch.config.schema import read_fields
from kt_model import errors

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "actions"


def test_every_action_has_a_page_and_no_page_is_left_over() -> None:
    assert {file.name for file in FOLDER.iterdir()} == markdown_files().keys()


@pytest.mark.parametrize("name", ["README.md", *(f"{action}.md" for action in ACTIONS)])
def test_the_page_is_current(name: str) -> None:
    assert (FOLDER / name).read_text() == markdown_files()[name], "python -m kt_launch.actions.manual docs/actions"


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_rows_of_tables_are_whole(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert [line for line in lines if line.startswith("|") != line.endswith("|")] == []


@pytest.mark.parametrize("action", ACTIONS)
def test_the_terminal_shows_the_same_page(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", f"action={action}"]) == 0
    shown = capsys.readouterr().out
    assert " ".join(shown.split()).startswith(f"kt-launch {action}: {ACTIONS[action]}")
    assert all(command in shown for command, _ in page_of(action).examples)
    assert "](" not in shown
    keys = shown.partition("\nKeys:\n")[2].splitlines()
    assert all(line.startswith("  ") for line in keys)


def test_an_unknown_action_has_no_page_but_a_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "action=quantise"]) == 2
    assert "Did you mean kt-launch help quantize?" in capsys.readouterr().err


def test_an_action_is_named_as_it_is_typed() -> None:
    """Without action=: in what is printed, in pages and presets. The first line of a file may name it so."""
    long_form = re.compile(rf"(?<![\w.])action=({'|'.join(ACTIONS)})\b")
    folders = [*(ROOT / "launcher").rglob("*.py"), *(ROOT / "plugins").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    found = []
    for file in [*folders, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        lines = file.read_text().replace("`kt-launch plan` and `kt-launch action=plan` are the same", "").splitlines()
        found += [(file, line) for line in lines if long_form.search(line) and not line.startswith('"""action=')]
    assert found == []


def test_every_key_stands_on_some_page() -> None:
    shown = {key for action in ACTIONS for key, _ in keys_of(page_of(action))}
    assert {key for key, _ in read_fields()} - shown == {"action.name"}


def test_a_page_names_no_key_that_is_not_there() -> None:
    known = [key for key, _ in read_fields()]
    wanted = {key for action in ACTIONS for key in page_of(action).keys}
    assert [key for key in wanted if not any(name == key or name.startswith(key) for name in known)] == []


def test_the_readme_has_every_exit_code() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")} | {EXIT_FAILED}
    page = (FOLDER.parents[1] / "README.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes
