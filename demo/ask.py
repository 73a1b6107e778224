"""`make demo`: one server, one question, two answers (the base model's and the adapter's).

Starts `kt-launch` just as a person would, talks to it through the OpenAI API, and stops it with Ctrl-C.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx

QUESTION = "What is the capital of France?"
MODELS = ("demo", "demo:west")


def main() -> int:
    """Exit code 0 when both answered, differently, and the server stopped cleanly."""
    launcher = Path(sys.executable).with_name("kt-launch")
    server = subprocess.Popen([launcher, *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
    try:
        url = wait_for_ready(server)
        if url is None:
            return server.wait()
        answers = {model: ask(url, model) for model in MODELS}
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    print(f"question: {QUESTION}")
    for model, answer in answers.items():
        print(f"{model} | {answer}")
    return 0 if len(set(answers.values())) == len(MODELS) and server.returncode == 130 else 1


def wait_for_ready(server: subprocess.Popen[str]) -> str | None:
    """Repeat the launcher's lines until it says `ready: URL`; None when it ends first."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("ready: "):
            return line.removeprefix("ready: ").strip()
    return None


def ask(url: str, model: str) -> str:
    """The greedy answer to QUESTION over /v1/chat/completions, on one line."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 64}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120.0, trust_env=False)
    answer.raise_for_status()
    content: str = answer.json()["choices"][0]["message"]["content"]
    return " ".join(content.split())


if __name__ == "__main__":
    sys.exit(main())
