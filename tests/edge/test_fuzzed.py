"""Every route of the server with bodies that nobody would write, other ones each night: it stays the same process, is
at fault for none of them, and answers as before. What was found is a row of test_served.py.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from pathlib import Path

import pytest
from launching import launched
from throw_away import make_throw_away

pytestmark = [pytest.mark.server, pytest.mark.nightly, pytest.mark.timeout(2400)]
EXAMPLES, SECONDS = 20, 12
"""For each operation, fitting and not."""
KEY = "adm-of-this-test"
PROMPTS = ("What is the capital of France?", "How are you?")


def test_no_body_ends_the_server_or_changes_its_answers(tmp_path: Path) -> None:
    python, seed = make_throw_away(tmp_path / "venv", "fuzz.txt"), secrets.randbelow(1 << 32)
    words, env = ("proof.whole_model=off", "server.admin_key=env:KT_LAUNCH_ADMIN_KEY"), {"KT_LAUNCH_ADMIN_KEY": KEY}
    with launched(*words, runs=tmp_path / "runs", env=env) as running:
        names = ("demo", "demo:west")
        before = [running.chat(name, prompt) for name in names for prompt in PROMPTS]
        processes = {each.pid for each in running.server_processes()}
        script = Path(__file__).with_name("fuzz_routes.py")
        numbers = map(str, (seed, EXAMPLES, SECONDS))
        command: list[str | Path] = [python, script, str(running.client.base_url), KEY, *numbers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2100)
        assert done.returncode == 0, done.stderr
        *failed, last = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        print(seed, last)
        assert failed == [], f"seed {seed}"
        assert last["counts"]["200"] > 50
        assert {each.pid for each in running.server_processes()} == processes
        assert [running.chat(name, prompt) for name in names for prompt in PROMPTS] == before
