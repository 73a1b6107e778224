"""The interactive chat: reads lines, and shows answers as they arrive, or two of them side by side.

Without a terminal, each line of stdin is a question, and only answers go to stdout.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from kt_launch.talking.answers import Answer, stream
from kt_launch.talking.conversation import Conversation, Quit, Turn
from kt_model.errors import EXIT_OK, LaunchError
from kt_model.printable import say

GREETING = "Type a question. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends."
GAP = 3
SHOWN_LINES = 6
"""Lines of the terminal that a comparison leaves free."""
REFRESH_S = 0.1


class Chat:
    """options: fields of each request besides model and messages."""

    def __init__(self, client: httpx.Client, conversation: Conversation, options: dict[str, Any]) -> None:
        self._client, self._conversation, self._options = client, conversation, options
        self._typed = sys.stdin.isatty()
        self._live = sys.stdout.isatty()

    def run(self) -> int:
        """Runs until the end of input, or /quit."""
        if self._typed:
            self._tell(GREETING)
        for line in self._lines():
            try:
                self._answer(line)
            except Quit:
                break
            except KeyboardInterrupt:  # just as an answer ended, or a command
                if not self._typed:
                    raise
            except LaunchError as mistake:
                if not self._typed or mistake.exit_code != LaunchError.exit_code:
                    raise
                self._tell(str(mistake))
        return EXIT_OK

    def _lines(self) -> Iterator[str]:
        """The lines that are not empty."""
        if self._typed:
            import readline  # noqa: F401  input() edits lines and remembers them
        while True:
            try:
                line = input(self._prompt) if self._typed else sys.stdin.readline()
            except KeyboardInterrupt:
                self._tell("\n(Ctrl-D or /quit ends)")
                continue
            except EOFError:
                print(file=sys.stderr)
                return
            if not self._typed and not line:
                return
            if line.strip():
                yield line.strip()

    @property
    def _prompt(self) -> str:
        return f"{' | '.join(map(self._conversation.short, self._conversation.asked))}> "

    def _answer(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._tell(self._conversation.command(line))
            return
        turn = self._conversation.ask(line.removeprefix("/") if line.startswith("//") else line)
        asked = self._conversation.asked
        if len(asked) == 1:
            self._one(turn, asked[0])
        elif self._live:
            self._side_by_side(turn, asked)
        else:
            for model in asked:
                print(f"{model}:", flush=True)
                self._one(turn, model)

    def _one(self, turn: Turn, model: str) -> None:
        answer = Answer()
        try:
            with contextlib.closing(self._pieces(model, answer)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            answer.stopped = True
        if answer.text:
            print(flush=True)
        self._keep(turn, model, answer)
        if self._live or answer.problem:
            self._tell(f"({answer.summary})")

    def _pieces(self, model: str, answer: Answer) -> Any:
        return stream(self._client, model, self._conversation.messages(model), self._options, answer)

    def _side_by_side(self, turn: Turn, models: Sequence[str]) -> None:
        """Stream each in a thread; drawing happens here, in the main thread, where Ctrl-C arrives."""
        from rich.console import Console
        from rich.live import Live

        answers = {model: Answer() for model in models}
        over = threading.Event()
        failures: list[LaunchError] = []
        workers = [
            threading.Thread(target=self._collect, args=(model, answer, over, failures), daemon=True)
            for model, answer in answers.items()
        ]
        for worker in workers:
            worker.start()
        console = Console()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            try:
                while any(worker.is_alive() for worker in workers):
                    live.update(self._columns(answers, console.height - SHOWN_LINES), refresh=True)
                    workers[-1].join(REFRESH_S)
                    workers[0].join(REFRESH_S)
            except KeyboardInterrupt:
                over.set()
        for worker in workers:
            worker.join()
        console.print(self._columns(answers, None))
        for model, answer in answers.items():
            self._keep(turn, model, answer)
        if failures:
            raise failures[0]

    def _collect(self, model: str, answer: Answer, over: threading.Event, failures: list[LaunchError]) -> None:
        try:
            with contextlib.closing(self._pieces(model, answer)) as pieces:
                for _ in pieces:
                    if over.is_set():
                        answer.stopped = True
                        return
        except LaunchError as failure:
            failures.append(failure)

    def _columns(self, answers: dict[str, Answer], lines: int | None) -> Any:
        """The answers next to each other; with `lines`, only the last lines of each."""
        from rich.table import Table
        from rich.text import Text

        width = (shutil.get_terminal_size().columns - GAP) // len(answers)
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for _ in answers:
            table.add_column(width=width, vertical="top")
        table.add_row(*(Text(self._conversation.short(model), style="bold") for model in answers))
        table.add_row(*(Text("\n".join(folded(answer.text, width)[-(lines or 0) :])) for answer in answers.values()))
        table.add_row(*(Text(answer.summary, style="dim") for answer in answers.values()))
        return table

    def _keep(self, turn: Turn, model: str, answer: Answer) -> None:
        """Add the answers to the conversation; a question without any answer is removed."""
        if answer.text:
            turn.answers[model] = answer.text
        elif turn in self._conversation.turns and not turn.answers and model == self._conversation.asked[-1]:
            self._conversation.turns.remove(turn)

    def _tell(self, text: str) -> None:
        say(text, file=sys.stderr, kept="\n")


def folded(text: str, width: int) -> list[str]:
    """The text's lines, wrapped to so many columns."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width, replace_whitespace=False) or [""]]
