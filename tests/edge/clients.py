"""`clients.py URL [TOKENIZER]`: other people's clients, asked as their documentation does; with a tokenizer guidellm.
Runs in an environment that has them; prints a line of JSON a client: what it got by the names, and what a name that
nothing has gave.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
URL, *TOKENIZER = sys.argv[1:]
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
NAMES = ("demo", "demo:west")
STRANGER = "demo:wset"


def ask_openai(name: str) -> str:
    import openai

    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
    return str(client.chat.completions.create(model=name, messages=MESSAGES, temperature=0).choices[0].message.content)


def ask_litellm(name: str) -> str:
    import litellm

    own = {"api_base": f"{URL}/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
    return str(litellm.completion(model=f"openai/{name}", messages=MESSAGES, **own).choices[0].message.content)


def stream_litellm(name: str) -> str:
    import litellm

    own = {"api_base": f"{URL}/v1", "api_key": "none", "temperature": 0, "num_retries": 0, "stream": True}
    chunks = litellm.completion(model=f"openai/{name}", messages=MESSAGES, **own)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def ask_langchain(name: str) -> str:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key="none", temperature=0, max_retries=0)
    answer = chat.invoke(MESSAGES[0]["content"])
    assert answer.response_metadata["model_name"] == name
    return str(answer.content)


def stream_langchain(name: str) -> str:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key="none", temperature=0, max_retries=0)
    return "".join(str(chunk.content) for chunk in chat.stream(MESSAGES[0]["content"]))


CLIENTS = {
    "openai": (ask_openai,),
    "litellm": (ask_litellm, stream_litellm),
    "langchain_openai": (ask_langchain, stream_langchain),
}
"""By package, those that ask where it is installed."""


def failure(ask: Callable[[str], str], name: str) -> str:
    """The class of the exception that a client raises for a name."""
    try:
        return f"no exception: {ask(name)}"
    except Exception as refused:
        return type(refused).__name__


def run_guidellm(name: str) -> dict[str, int]:
    """How many of its requests succeeded, and how many did not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = (
            *(Path(sys.executable).with_name("guidellm"), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={URL},model={name}", "--profile", "kind=synchronous"),
            *("--constraint", "kind=max_requests,count=3", "--tokenizer", f"kind=hf_auto,model={TOKENIZER[0]}"),
            *("--data", "kind=synthetic_text,prompt_tokens=8,output_tokens=4", "--output", f"kind=json,path={report}"),
        )
        subprocess.run(command, check=True, stdout=sys.stderr)
        requests: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]["requests"]
    return {how: len(requests[how]) for how in ("successful", "errored", "incomplete")}


def main() -> None:
    if TOKENIZER:
        print(json.dumps({"client": "guidellm", "requests": run_guidellm("demo:west")}), flush=True)
        return
    for ask in (ask for package, asks in CLIENTS.items() if find_spec(package) for ask in asks):
        answers = {name: ask(name) for name in NAMES}
        print(json.dumps({"client": ask.__name__, "answers": answers, "stranger": failure(ask, STRANGER)}), flush=True)


if __name__ == "__main__":
    main()
