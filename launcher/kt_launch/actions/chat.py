"""action=chat: chats in the terminal with a running server, or with one started for it. The code is in talking/."""

from __future__ import annotations

from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import LAUNCH_KEYS, Page
from kt_launch.config.schema import Chat as ChatConfig
from kt_launch.talking.answers import read_ids
from kt_launch.talking.conversation import Conversation
from kt_launch.talking.find_server import connected
from kt_launch.talking.terminal import Chat

PAGE = Page(
    (
        "Talks to a server: the latest run that is ready, the one that is named, or the address of chat.url. Where a "
        "model or an adapter is given, a ready run that serves them; if there is none, a server is started, and ends "
        "with the chat. None is started in the place of a run that is named, or that is still starting.",
        "In it, `/adapter NAME` talks to an adapter and `/base` to the base model; `/compare` shows both side by side "
        "while they answer. `/clear` forgets what was said, `/help` lists the commands, `/quit` or Ctrl-D ends, and "
        "Ctrl-C stops an answer. A question that begins with / is typed with two of them.",
        "Without a terminal each line of stdin is a question (or a command), and stdout gets the answers alone. "
        "Control characters in answers are shown as escapes. A key comes from the run's own server.api_key, or, "
        "for chat.url, from the one given here.",
    ),
    (
        ("kt-launch chat", "the server that runs, or the demo"),
        ("kt-launch chat RUN", "this run's server"),
        ("kt-launch chat chat.adapter=west", "begin with an adapter"),
        ("kt-launch chat model=deepseek_v2_lite lora=west_all", "the run that serves them, or a new one"),
        ("kt-launch chat chat.url=http://10.0.0.7:30000 server.api_key=env:KEY", "another machine's"),
        ("echo 'What is the capital of France?' | kt-launch chat", "from a script"),
    ),
    ("run", "chat.", *LAUNCH_KEYS),
)


def run(job: Job) -> int:
    job.problems.raise_if_any()
    with connected(job.config, job.sources, job.problems, job.overrides) as client:
        chat = job.config.chat
        conversation = Conversation(lambda: read_ids(client), chat.adapter, chat.system)
        return Chat(client, conversation, _options(chat)).run()


def _options(chat: ChatConfig) -> dict[str, Any]:
    """Fields of each request besides its messages; those not given are left to the server."""
    given = {"max_tokens": chat.max_tokens, "temperature": chat.temperature}
    return {name: value for name, value in given.items() if value is not None}
