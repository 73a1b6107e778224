"""Pictures of the terminal show what the commands print today; docs/pictures/make.py draws them anew."""

from __future__ import annotations

import html
import importlib.util
import re
from types import ModuleType

import pytest
from docs_pages import ROOT

from kt_launch.cli import main
from kt_launch.config.schema import read_fields

FOLDER = ROOT / "docs" / "pictures"
KEY = re.compile(r"[a-z]+(\.[a-z_]+)+")


@pytest.fixture(scope="module")
def drawn() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", FOLDER / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(picture: str) -> list[str]:
    """What stands in a picture, from the command on."""
    text = html.unescape(re.sub(r"</text>", "", (FOLDER / f"{picture}.svg").read_text())).replace("\xa0", " ")
    shown: dict[str, str] = {}
    for line, part in re.findall(r'clip-path="url\(#[\w-]*line-(\d+)\)">([^<]*)', text):
        shown[line] = shown.get(line, "") + part
    return list(shown.values())


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(command.split()[1:])
    return "".join(capsys.readouterr())


def test_each_picture_is_of_its_command(drawn: ModuleType) -> None:
    assert {name: lines_of(name)[0].split() for name in drawn.PICTURES} == {
        name: ["$", *command.split()] for name, command in drawn.PICTURES.items()
    }


@pytest.mark.parametrize("name", ["mistakes", "inspect"])
def test_what_does_not_depend_on_the_machine_is_in_the_picture(
    name: str, drawn: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {word for word in printed(drawn.PICTURES[name], capsys).split() if "/" not in word}
    assert words - {*" ".join(lines_of(name)).split()} == set()


def test_the_plan_has_these_keys(drawn: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    today = printed("kt-launch plan model=demo server.device=cpu", capsys).splitlines()
    first = [{line.split()[0] for line in lines if KEY.match(line)} for lines in (today, lines_of("plan"))]
    assert first[0] == first[1]


def test_the_key_is_explained_in_todays_words() -> None:
    (meaning,) = (field.description for key, field in read_fields() if key == "kt.cpuinfer")
    assert meaning and " ".join(meaning.split()) in " ".join(" ".join(lines_of("explain")).split())
