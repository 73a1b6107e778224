"""What a client gets by name: each id that /v1/models lists, requested through the OpenAI routes, must answer as the
base or adapter that it names. A part of the proof.

The reference is SGLang's own /generate on the same tokens, where `lora_path` alone selects the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from kt_launch.proving.generate import generate
from kt_model.acceptance import TOP_LOGPROBS, Logprobs, difference
from kt_model.contract import NO_TEMPLATE
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WITHOUT_TEMPLATE = "its tokenizer has no chat template"
MOST_SAID = 200
REPORT = "report this with the run folder"


@dataclass(frozen=True)
class Names:
    """route: the one requested, COMPLETIONS if a plain question is refused as a chat; ids: all of them; reason: why the
    chat is, "" if it is not."""

    route: str
    ids: tuple[str, ...]
    reason: str = ""

    def line(self) -> str:
        """A sentence for the terminal."""
        reason = f", as {self.reason}" if self.reason else ""
        return f"{', '.join(self.ids)}: {self.route} answers each name with its own model{reason}"


def check_names(plan: LaunchPlan, client: httpx.Client, prompt: str, smallest: float, factor: float) -> Names:
    """Request every listed id. It may differ from its reference by `smallest`, or by 1/`factor` of the distance to the
    nearest other id. Raises ProofFailed saying which id answers as another."""
    base = plan.value("model.name")
    adapters: dict[str, str | None] = {base: None, **{f"{base}:{name}": name for name in plan.adapters}}
    _check_list(client, set(adapters))
    tokens, reason = _chat_tokens(client, base, prompt)
    route, given = (COMPLETIONS, {"text": prompt}) if reason else (CHAT, {"input_ids": tokens})
    measures = {id: _generate(client, given, adapter) for id, adapter in adapters.items()}
    for id, measure in measures.items():
        off = difference(_ask(client, route, id, prompt), measure)
        parted = min((difference(measure, other) for name, other in measures.items() if name != id), default=math.inf)
        if off > max(smallest, parted / factor):
            problem = (
                f"its first-token logprobs over {route} differ from those of /generate by {off:.2g}, expected at most"
            )
            raise ProofFailed(id, f"{problem} {max(smallest, parted / factor):.2g}: another model answers", REPORT)
    return Names(route, tuple(adapters), reason)


def _check_list(client: httpx.Client, expected: set[str]) -> None:
    listed = {each["id"] for each in _json(client.get("/v1/models"), "/v1/models")["data"]}
    if listed != expected:
        raise ProofFailed("proof", f"/v1/models lists {sorted(listed)}, expected {sorted(expected)}", REPORT)


def _chat_tokens(client: httpx.Client, model: str, prompt: str) -> tuple[list[int], str]:
    """The tokens that the chat route makes of the prompt, and why it makes none: there is no chat template, or it takes
    no plain question."""
    answer = client.post("/v1/tokenize", json={"model": model, "messages": _messages(prompt)})
    if answer.status_code == httpx.codes.BAD_REQUEST:
        error = answer.json()
        said = str(error.get("message") or error.get("error", {}).get("message"))
        refused = f"its chat template refuses a plain question: {said[:MOST_SAID]}"
        return [], WITHOUT_TEMPLATE if NO_TEMPLATE in said else refused
    return _json(answer, "/v1/tokenize")["tokens"], ""


def _generate(client: httpx.Client, given: Mapping[str, Any], adapter: str | None) -> Logprobs:
    """First tokens by text, which is all that the OpenAI routes return; if two have the same text, the later one
    counts, for both routes."""
    wanted = {"return_logprob": True, "top_logprobs_num": TOP_LOGPROBS, "return_text_in_logprobs": True}
    top = generate(client, **given, **wanted, lora_path=adapter)["meta_info"]["output_top_logprobs"][0]
    return {text: logprob for logprob, _, text in top}


def _ask(client: httpx.Client, route: str, model: str, prompt: str) -> Logprobs:
    client.post("/flush_cache")
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0}
    if route == CHAT:
        body |= {"messages": _messages(prompt), "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    else:
        body |= {"prompt": prompt, "logprobs": TOP_LOGPROBS}
    answer = _json(client.post(route, json=body), f"{route} for {model}")
    if answer["model"] != model:
        raise ProofFailed(model, f"{route} answers as {answer['model']!r}", REPORT)
    logprobs = answer["choices"][0]["logprobs"]
    if route == CHAT:
        return {each["token"]: each["logprob"] for each in logprobs["content"][0]["top_logprobs"]}
    return dict(logprobs["top_logprobs"][0])


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _json(answer: httpx.Response, what: str) -> Any:
    if answer.is_error:
        raise ProofFailed("proof", f"{what} answered {answer.status_code}: {answer.text[:500]}", REPORT)
    return answer.json()
