"""Commands and keys that stand in a sentence of a page: the words are those that the command line knows.

Commands in code blocks are test_commands.py's, which runs them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from docs_pages import markdown_pages, prose

from kt_launch.commandline.arguments import FLAGS
from kt_launch.config.actions import ACTIONS, PAGES
from kt_launch.config.schema import in_dictionary, read_fields
from kt_launch.planning.rules import RULES

KEYS = frozenset(key for key, _ in read_fields())
SECTIONS = frozenset(key.split(".")[0] for key in KEYS if "." in key)
GROUPS = ("model", "lora", "kt", "server", "sweep", "action")
OTHERS = {
    "config.json": "a file",
    "proof.json": "a file",
    "model.embed_tokens": "a tensor",
    "server.ids": "Python",
    "server.plan": "Python",
    "server.run_folder": "Python",
    "server.running": "Python",
}
"""Dotted names that begin as a key does."""
NAMES = ("NAME", "FILE", "RUN", "KEY")
"""What stands for a word of the reader's own."""


def spans() -> Iterator[tuple[str, str]]:
    """(page, code) of each code span, once."""
    found: set[str] = set()
    for page in markdown_pages():
        for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", prose(page), flags=re.DOTALL)):
            text = " ".join(code.split())
            if text not in found:
                found.add(text)
                yield str(page), text


def is_key(name: str) -> bool:
    """Of the config or of a plan; a section's name stands for all of its keys."""
    below = (key.startswith(f"{name.removesuffix('.')}.") for key in KEYS)
    return name in KEYS or name in RULES or in_dictionary(name) or any(below)


def is_known(word: str) -> bool:
    key, given, _ = word.partition("=")
    if given:
        return key in GROUPS or key in KEYS or in_dictionary(key)
    return word in (*FLAGS, *ACTIONS, *PAGES, *NAMES, "…") or is_key(word)


COMMANDS = [(page, code) for page, code in spans() if code.startswith("kt-launch ")]
KEYS_IN_PROSE = [
    (page, key)
    for page, code in spans()
    for key in re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})\.[a-z_.]+[a-z_])(?![\w/*<(-])", code)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_in_a_sentence_has_known_words(page: str, command: str) -> None:
    assert [word for word in shlex.split(command)[1:] if not is_known(word)] == []


@pytest.mark.parametrize(("page", "key"), sorted({(page, key) for page, key in KEYS_IN_PROSE if key not in OTHERS}))
def test_a_key_in_a_sentence_exists(page: str, key: str) -> None:
    assert is_key(key)


def test_enough_is_found_and_nothing_is_let_through() -> None:
    assert len(COMMANDS) > 20 and len(KEYS_IN_PROSE) > 100
    assert not is_known("server.prot=1") and not is_known("quantise") and not is_key("kt.cpuinfr")
