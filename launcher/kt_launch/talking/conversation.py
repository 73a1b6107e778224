"""A conversation: its turns, which models the next question goes to, and the commands to change that. Shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kt_launch.talking.answers import Message
from kt_model.errors import LaunchError
from kt_model.nearest import did_you_mean

HELP = {
    "/adapter NAME": "talk to an adapter; without a name, list them",
    "/base": "talk to the base model",
    "/compare [NAME]": "base and adapter side by side",
    "/clear": "forget what was said",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


class Quit(Exception):
    """The user ends the chat."""


@dataclass
class Turn:
    """A question, and each model's answer."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)


class Conversation:
    """ids: fetches the models' names; called for each look-up, since adapters are loaded and unloaded."""

    def __init__(self, ids: Callable[[], Sequence[str]], adapter: str | None = None, system: str | None = None) -> None:
        self._ids = ids
        self._system = system
        self.turns: list[Turn] = []
        self.base = ids()[0]
        self.asked = [self._named(adapter) if adapter else self.base]
        """The models that the next question goes to: one, or two side by side."""

    def ask(self, question: str) -> Turn:
        """A new turn, without answers yet."""
        self.turns.append(Turn(question))
        return self.turns[-1]

    def messages(self, model: str) -> list[Message]:
        """The conversation as this model had it, up to the last question; a turn that another model answered has that
        answer."""
        found = [Message("system", self._system)] if self._system else []
        for turn in self.turns:
            found.append(Message("user", turn.question))
            answer = turn.answers.get(model) or next(iter(turn.answers.values()), "")
            if answer and turn is not self.turns[-1]:
                found.append(Message("assistant", answer))
        return found

    def short(self, model: str) -> str:
        """An adapter by its own name, the base by the model's name."""
        return model.removeprefix(f"{self.base}:")

    def command(self, line: str) -> str:
        """Execute a line that begins with /; returns what to print. Raises Quit, and LaunchError for a mistake."""
        name, _, rest = line.partition(" ")
        do = self._commands.get(name)
        if do is None:
            raise LaunchError(name, "no such command", did_you_mean(name, self._commands, "/help lists them."))
        return do(rest.strip())

    @property
    def _commands(self) -> Mapping[str, Callable[[str], str]]:
        return {
            "/adapter": self._adapter,
            "/base": lambda _: self._talk_to(self.base),
            "/compare": self._compare,
            "/clear": self._clear,
            "/help": lambda _: "\n".join(f"{command:<16} {meaning}" for command, meaning in HELP.items()),
            "/quit": self._quit,
        }

    def _adapter(self, name: str) -> str:
        if not name:
            return f"adapters: {', '.join(map(self.short, self._adapters())) or 'none'}"
        return self._talk_to(self._named(name))

    def _compare(self, name: str) -> str:
        current = [model for model in self.asked if model != self.base]
        others = [self._named(name)] if name else [*current, *self._adapters()]
        if not others:
            raise LaunchError("/compare", f"{self.base} has no adapters", "Start with lora=<adapter>.")
        return self._talk_to(self.base, others[0])

    def _clear(self, _: str) -> str:
        self.turns.clear()
        return "forgotten"

    def _quit(self, _: str) -> str:
        raise Quit

    def _talk_to(self, *models: str) -> str:
        self.asked = [*models]
        return f"asking {' and '.join(self.asked)}"

    def _adapters(self) -> list[str]:
        return [model for model in self._ids() if model != self.base]

    def _named(self, name: str) -> str:
        adapters = self._adapters()
        found = [model for model in adapters if name in (model, self.short(model))]
        if found:
            return found[0]
        if name == self.base:
            return self.base
        known = [self.short(model) for model in adapters]
        fix = did_you_mean(name, known, f"There are: {', '.join(known) or 'none'}.")
        raise LaunchError("adapter", f"no adapter {name}", fix)
