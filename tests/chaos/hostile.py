"""Requests and adapters that nobody should send: requests from the table beside this file, adapters from a sound
one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
from hostile_files import mutate

TABLE = Path(__file__).with_name("requests.json")
MUTATIONS = 20
ANSWER_S = 30.0
NO_ANSWER = 599
"""In the place of a status: nothing came in time."""


@dataclass(frozen=True)
class Request:
    """One row of the table."""

    method: str
    path: str
    body: Any

    def send(self, client: httpx.Client) -> int | None:
        """The status; None where the server hangs up twice: after an error it closes the connection once."""
        return self._send_once(client) or self._send_once(client)

    def _send_once(self, client: httpx.Client) -> int | None:
        content = self.body if isinstance(self.body, str) else json.dumps(self.body)
        try:
            return client.request(
                self.method, self.path, content=content, headers={"Content-Type": "application/json"}, timeout=ANSWER_S
            ).status_code
        except httpx.TimeoutException:
            return NO_ANSWER
        except httpx.TransportError:
            return None


def requests() -> list[Request]:
    """All rows."""
    rows = json.loads(TABLE.read_text())
    return [Request(row["method"], row["path"], _long(row["body"])) for row in rows]


def _long(body: Any) -> Any:
    """{"$repeat": [x, n]} is x, a text or a list, so many times."""
    if isinstance(body, dict):
        if "$repeat" in body:
            what, times = body["$repeat"]
            return what * times
        return {name: _long(value) for name, value in body.items()}
    return [_long(value) for value in body] if isinstance(body, list) else body


def adapters(allowed: Path, sound: Path, rng: Random) -> Iterator[tuple[str, Path]]:
    """Folders of adapters that are damaged in one way each, one at a time."""
    for name, damage in DAMAGES.items():
        folder = allowed / name
        shutil.copytree(sound, folder)
        damage(folder)
        yield name, folder
        shutil.rmtree(folder)
    for number in range(MUTATIONS):
        folder = allowed / f"mutated{number}"
        shutil.copytree(sound, folder)
        config = folder / CONFIG
        config.write_text(json.dumps(mutate(json.loads(config.read_text()), rng), default=str), errors="replace")
        yield folder.name, folder
        shutil.rmtree(folder)


def sound_copy(allowed: Path, sound: Path) -> Path:
    """One that nothing is wrong with, where it may be loaded from."""
    return Path(shutil.copytree(sound, allowed / "sound"))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _set(**values: Any) -> Any:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | values))

    return damage


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _filled(value: float) -> Any:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        save_file({name: each.fill_(value) for name, each in tensors.items()}, folder / WEIGHTS)

    return damage


DAMAGES: dict[str, Any] = {
    "pipe": _pipe,
    "device": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("/dev/zero")),
    "link out": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("/etc/passwd")),
    "cut": _cut,
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "pickle": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "long header": lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f{}"),
    "nan": _filled(float("nan")),
    "overflow": _filled(3e38),
    "huge": _filled(1e30),
    "rank 0": _set(r=0),
    "rank too high": _set(r=10**6),
    "endless pattern": _set(rank_pattern={"(a+)+$": 4, "(.*)*x": 2}),
    "alpha": _set(lora_alpha=1e300),
    "dora": _set(use_dora=True),
    "template": _set(base_model_name_or_path="{{ 7*7 }}\x1b[2J"),
}
"""What is wrong with it -> how it comes about."""
