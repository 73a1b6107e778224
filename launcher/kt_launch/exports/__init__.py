"""Exports a launch to other supervisors: systemd unit, Dockerfile, compose file, Kubernetes manifest. Text from a plan;
pure.

Each calls kt-launch with every choice spelled out, so that it needs neither presets nor the exporting user's
environment; probed values (threads, backends) are probed where it runs. Secrets must be set there.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kt_launch.commandline.choices import split_list
from kt_launch.config.schema import Config
from kt_launch.planning.access import DEFAULT
from kt_launch.planning.ranks import Ranks, ranks_of
from kt_launch.planning.threads import cores_beside
from kt_model.contract import OWN_ADMIN_KEY
from kt_model.errors import LaunchError
from kt_model.plan import LaunchPlan
from kt_model.printable import printable
from kt_model.redaction import absolute_place, key_files, references

PORT, METRICS_PORT = 30000, 30001
"""Used if the config leaves the choice to the start."""
FORMATS: Mapping[str, str] = {
    "systemd": "kt_launch.exports.systemd",
    "docker": "kt_launch.exports.docker",
    "compose": "kt_launch.exports.compose",
    "kubernetes": "kt_launch.exports.kubernetes",
}
CONTAINERS = ("docker", "compose", "kubernetes")
"""Formats that mount the folders."""
SAID_BY_HAND = (
    *("lora.adapters", "lora.path", "lora.name", "lora.allow", "kt.weight_path", "kt.prepare"),
    *("server.host", "server.port", "server.metrics_port", "server.playground_port", "server.restarts"),
)
HEALTH_EVERY_S, PROBE_TIMEOUT_S = 30, 10
KEY_PART = re.compile(r"[A-Za-z][\w-]*")
SECTIONS = ("lora", "kt", "server")


@dataclass(frozen=True)
class Launch:
    """What all formats need from a plan, and from the machine it was exported on."""

    name: str
    device: str
    overrides: tuple[str, ...]
    """Without address, ports and restarts, which the format chooses."""
    folders: tuple[str, ...]
    """Folders that the server reads: checkpoint, weights, adapters, and where more of them may be."""
    key_files: tuple[str, ...]
    """Files that it reads keys from."""
    secrets: tuple[str, ...]
    """Environment variables that must be set where it runs."""
    asks_key: bool
    """Whether requests need a key, or the user has declared that they need none."""
    host: str
    port: int
    metrics_port: int | None
    restarts: int | None
    ranks: Ranks
    """The scheduler processes, each with one GPU if there are any."""
    threads: int
    """Expert threads of each process that computes routed experts."""
    pools: int
    """Thread pools; with more than one, memory is placed on NUMA nodes, for which a container needs the SYS_NICE
    capability."""
    start_timeout_s: float
    hang_timeout_s: float
    memory_gib: int
    version: str
    python: str
    user: str

    @property
    def cpus(self) -> int:
        """CPUs for expert threads, and for the processes beside them."""
        return self.threads * self.ranks.computing + cores_beside(self.ranks)

    @property
    def mounted(self) -> tuple[str, ...]:
        """What a container needs of the machine's files, at the same paths."""
        return (*self.folders, *self.key_files)

    @property
    def label(self) -> str:
        """The name in a form that hosts, services and files may have."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "model"

    def in_container(self) -> Launch:
        """The same with a key, since a container listens on all of its addresses."""
        if self.asks_key:
            return self
        key = DEFAULT["server.api_key"]
        return replace(self, overrides=(*self.overrides, f"server.api_key=env:{key}"), secrets=(*self.secrets, key))

    def words(self, host: str | None = None, restarts: int | None = None) -> list[str]:
        """Arguments of kt-launch, with the address to listen on, and the number of restarts if the plan does not set
        it."""
        words = [*self.overrides, f"server.host={host or self.host}", f"server.port={self.port}"]
        if self.metrics_port is not None:
            words.append(f"server.metrics_port={self.metrics_port}")
        count = restarts if self.restarts is None else self.restarts
        return words if count is None else [*words, f"server.restarts={count}"]


def read_launch(
    plan: LaunchPlan, *, weights_made: bool, memory_gib: int, version: str, python: str, user: str
) -> Launch:
    """What the formats need. weights_made: whether kt.weight_path already exists, instead of being made by
    kt.prepare."""
    server = plan.config["server"]
    weights = [plan.value("kt.weight_path")] if weights_made else []
    folders = dict.fromkeys([plan.value("model.path"), *weights, *plan.adapters.values(), *_allowed(plan)])
    metrics_port = server["metrics_port"]
    return Launch(
        name=plan.value("model.name"),
        device=plan.value("server.device"),
        overrides=tuple(spell_out(plan, weights_made)),
        folders=tuple(folders),
        key_files=tuple(dict.fromkeys(str(file) for file in key_files(plan.argv))),
        secrets=tuple(name for name in dict.fromkeys(references(plan.argv)) if name != OWN_ADMIN_KEY),
        asks_key="--api-key" in " ".join(plan.argv) or server["open"],
        host=server["host"],
        port=server["port"] or PORT,
        metrics_port=metrics_port if metrics_port != 0 else METRICS_PORT,
        restarts=server["restarts"],
        ranks=ranks_of(Config.model_validate(plan.config)),
        threads=plan.value("kt.cpuinfer"),
        pools=plan.value("kt.threadpool_count"),
        start_timeout_s=server["start_timeout_s"],
        hang_timeout_s=server["hang_timeout_s"],
        memory_gib=memory_gib,
        version=version,
        python=python,
        user=user,
    )


def write_export(launch: Launch, form: str) -> str:
    """The text of one format. Raises LaunchError for a name or path that would not stay one word in it."""
    for text in (*launch.overrides, *launch.mounted, launch.name, launch.user, launch.python):
        if printable(str(text)) != str(text):
            problem = f"{printable(str(text))} has a line break or a control character, which no export can hold"
            raise LaunchError("export", problem, "Rename the file or folder.")
    for path in launch.mounted if form in CONTAINERS else ():
        if ":" in path:
            problem = f"{path} has a colon, at which {form} ends the path of a folder"
            raise LaunchError("export", problem, "Rename the folder, or name it by a link: ln -s FOLDER /a/link.")
    text = importlib.import_module(FORMATS[form]).write(launch)
    assert isinstance(text, str)
    return text


def dump(*documents: Any) -> str:
    """YAML in the order of the keys given."""
    import yaml

    class Plain(yaml.SafeDumper):
        """A YAML dumper without anchors: a value that is used twice is written twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    text = yaml.dump_all(documents, Dumper=Plain, sort_keys=False, allow_unicode=True, width=10_000)
    assert isinstance(text, str)
    return text


def spell_out(plan: LaunchPlan, weights_made: bool) -> Iterator[str]:
    """Overrides that express the plan's whole config, without presets."""
    yield from ("model=auto", f"model.path={plan.value('model.path')}", f"model.name={plan.value('model.name')}")
    if plan.config["model"]["trust_remote_code"]:
        yield "model.trust_remote_code=true"
    for name, path in plan.adapters.items():
        if KEY_PART.fullmatch(name):
            yield f"lora.adapters.{name}.path={path}"
        else:  # a name that cannot be part of a key: at most one, given by lora.path
            yield from (f"lora.path={path}", f"lora.name={name}")
    if not plan.adapters:
        yield "lora=none"
    if (allowed := _allowed(plan)) or plan.config["lora"]["allow"] is not None:
        yield f"lora.allow={_typed(allowed)}"
    yield from _spell_out_weights(plan, weights_made)
    default = Config().model_dump(mode="json")
    for section in SECTIONS:
        for name, value in plan.config[section].items():
            if value != default[section].get(name) and f"{section}.{name}" not in SAID_BY_HAND:
                yield f"{section}.{name}={_typed(_elsewhere(value))}"


def _allowed(plan: LaunchPlan) -> list[str]:
    """The folders for adapters that are loaded later, unless they follow from the chosen adapters."""
    allowed: list[str] = plan.resolved["lora.allow"].value if "lora.allow" in plan.resolved else []
    return allowed if plan.config["lora"]["allow"] is not None or not plan.adapters else []


def _spell_out_weights(plan: LaunchPlan, made: bool) -> Iterator[str]:
    """The folder of quantized experts by path, since another user's cache does not have it; or that it must be made."""
    if plan.value("kt.weight_path") != plan.value("model.path"):
        if made or plan.config["kt"]["weight_path"]:
            yield f"kt.weight_path={plan.value('kt.weight_path')}"
        if not made:
            yield "kt.prepare=true"


def _elsewhere(value: Any) -> Any:
    """A key's file by its absolute path, since what is exported runs in another folder."""
    return absolute_place(value) if isinstance(value, str) else value


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_item(str(item)) for item in value)}]"
    return str(value)


def _item(text: str) -> str:
    """A list item, quoted if it would otherwise be split."""
    if split_list(text) == [text]:
        return text
    return f'"{text}"' if "'" in text else f"'{text}'"
