"""Models and adapters by their names on the Hub: out of its cache, downloaded when that is wanted, told when it is not.
The Hub's own package talks to a stand-in.
"""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_launcher import call_forked
from hub_stand_in import COMMIT, Hub, running_hub
from tiny_files import write_adapter, write_checkpoint

from kt_model.hubcache import Repository, find_snapshot

TOKEN = "hf_" + "secretsecretsecret"
LARGE = 12 << 20
"""More than the Hub's package takes at once: it writes, and takes up again, pieces of 10 MiB."""
PICKLES = ("pytorch_model.bin", "modeling_tiny.py", "training_args.bin", "consolidated.00.safetensors")
LATER = 1 << 32
"""A time that has not come."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """With a model in two shards, and an adapter; beside both what is never fetched."""
    root = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        model = write_checkpoint(root / "tiny")
        _name_by_index(model)
        text = (model / "tokenizer.json").read_text() if (model / "tokenizer.json").exists() else "{}"
        (model / "tokenizer.json").write_text(text + " " * LARGE)
        for name in PICKLES:
            (model / name).write_bytes(b"never read")
        hub.repositories = {"org/tiny-moe": model, "org/west": write_adapter(root / "west")}
        (root / "west" / "optimizer.pt").write_bytes(b"never read")
        yield hub


def _name_by_index(model: Path) -> None:
    """The one file of weights becomes a shard that an index names."""
    from safetensors import safe_open

    shard = model / "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(shard)
    with safe_open(str(shard), "np") as opened:
        names = dict.fromkeys(opened.keys(), shard.name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """kt-launch in a process of its own: the Hub's package reads its environment once."""
    hub.asked.clear()
    hub.tokens.clear()

    def called(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return call_forked(words, tmp_path, environment(hub, tmp_path) | env, 300, anew="huggingface_hub")

    return called


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The Hub's package asks again after ten seconds, which a busy machine may take; here it waits for the answer."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"HF_HUB_DOWNLOAD_TIMEOUT": "240", "HF_HUB_ETAG_TIMEOUT": "240"}
    return {**os.environ, **own, "KT_LAUNCH_RUNS": str(home / "runs"), "KT_LAUNCH_CACHE": str(home / "cache")}


def plan_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_names_are_downloaded_checked_first_and_pinned(hub: Hub, call: Callable[..., Any], tmp_path: Path) -> None:
    words = ("plan", "--json", "server=cpu", "model=org/tiny-moe", "lora=[org/west]")
    told = call(*words)
    assert (told.returncode, told.stdout) == (2, "")
    first, second = told.stderr.splitlines()
    assert first.startswith(
        f"error: model: org/tiny-moe is neither a folder here nor in the Hub's cache ({tmp_path}/hf/hub)"
    )
    assert " files would be downloaded). Set hub.download=true, or run: hf download org/tiny-moe --include " in first
    assert second.startswith("error: lora.adapters.west: org/west is neither a folder here nor in the Hub's cache")
    assert set(hub.files()) == {"config.json", "model.safetensors.index.json"}

    made = plan_of(call(*words, "hub.download=true"))
    snapshot = tmp_path / "hf/hub/models--org--tiny-moe/snapshots" / COMMIT
    values = {key: item["value"] for key, item in made["resolved"].items()}
    assert (values["model.path"], values["model.name"]) == (str(snapshot), "tiny-moe")
    assert (values["model.hub"], values["model.revision"]) == ("org/tiny-moe", COMMIT)
    assert (
        values["lora.west.path"].endswith(f"models--org--west/snapshots/{COMMIT}"),
        values["lora.west.revision"],
    ) == (
        True,
        COMMIT,
    )
    assert [name for name in (*PICKLES, "optimizer.pt") if name in hub.files()] == []
    assert hub.tokens and TOKEN not in told.stderr + told.stdout + json.dumps(made)

    hub.asked.clear()
    assert plan_of(call(*words)) is not None
    assert plan_of(call("plan", "--json", "server=cpu", f"model=org/tiny-moe@{COMMIT}", HF_HUB_OFFLINE="1"))
    assert hub.asked == [], "what is in the cache is not asked for again"

    kept = call("config", "config.resolved=true", *words[2:], "server.port=11623")
    assert kept.returncode == 0, kept.stderr
    assert f'revision: "{COMMIT}"' in kept.stdout and str(tmp_path) not in kept.stdout.partition("made_with")[0]
    (tmp_path / "run.yaml").write_text(kept.stdout)
    again = plan_of(call("--config", str(tmp_path / "run.yaml"), "plan", "--json", HF_HUB_OFFLINE="1"))
    assert again["resolved"]["lora.west.revision"]["value"] == COMMIT


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub, call: Callable[..., Any]) -> None:
    hub.cut["tokenizer.json"] = LARGE - 1000
    done = call("plan", "--json", "server=cpu", "model=org/tiny-moe", "hub.download=true")
    path = Path(plan_of(done)["resolved"]["model.path"]["value"])
    whole = hub.repositories["org/tiny-moe"] / "tokenizer.json"
    assert (path / whole.name).read_bytes() == whole.read_bytes()
    ranges = [wanted for method, file, wanted in hub.asked if method == "GET" and file.endswith(whole.name)]
    assert ranges == ["", f"bytes={10 << 20}-"]


def test_an_interrupted_download_goes_on_with_the_files_it_lacks(hub: Hub, tmp_path: Path) -> None:
    words = ("plan", "--json", "server=cpu", "model=org/tiny-moe", "hub.download=true")
    hub.asked.clear()
    hub.cut = dict.fromkeys(["model-00001-of-00001.safetensors"], 10)
    command = [sys.executable, "-P", "-m", "kt_launch.cli", *words]
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while "model-00001-of-00001.safetensors" not in hub.files() and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    snapshot = tmp_path / "hf/hub/models--org--tiny-moe/snapshots" / COMMIT
    there = {file.name for file in snapshot.iterdir()}
    assert "config.json" in there
    partly = subprocess.run(
        command[:-1],
        cwd=tmp_path,
        env=environment(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if "model-00001-of-00001.safetensors" not in there:
        assert partly.returncode == 2
        assert "Where there is a network, run: hf download org/tiny-moe --include" in partly.stderr
    hub.asked.clear()
    blobs = snapshot.parents[1] / "blobs"
    drafts = [f"{(snapshot / 'config.json').resolve().name}.0badcafe.incomplete", "of-another.0badcafe.incomplete"]
    for draft in drafts:
        (blobs / draft).touch()
    refs = blobs.parent / "refs"
    refs.mkdir(exist_ok=True)
    for draft in ("main.0badcafe.tmp", "another.0badcafe.tmp", "main.tmp"):
        (refs / draft).touch()
        os.utime(refs / draft, (0, 0))
    (refs / "main.00badca1.tmp").touch()
    os.utime(refs / "main.00badca1.tmp", (LATER, LATER))
    done = subprocess.run(command, cwd=tmp_path, env=environment(hub, tmp_path), capture_output=True, text=True)
    assert plan_of(done)["resolved"]["model.revision"]["value"] == COMMIT
    assert "config.json" not in hub.files(), "what is there is not fetched again"
    assert [path.name for path in blobs.glob("*.incomplete")] == drafts[1:], "another file may be on its way"
    kept = {"another.0badcafe.tmp", "main.tmp", "main.00badca1.tmp"}
    assert {path.name for path in refs.glob("*.tmp")} == kept, "of no ref, not of the Hub's, or being written"


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["model=org/nothing"], {}, "org/nothing is neither a folder here nor on the Hub (not there). "),
        (["model=org/tiny-moe"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "and the Hub cannot be reached ("),
        (
            ["model=org/tiny-moe"],
            {"HF_HUB_OFFLINE": "1"},
            "and the Hub is switched off (HF_HUB_OFFLINE). Where there is",
        ),
    ],
    ids=["no repository", "no network", "offline"],
)
def test_what_cannot_be_had(words: list[str], env: dict[str, str], message: str, call: Callable[..., Any]) -> None:
    done = call("plan", "server=cpu", *words, "hub.download=true", **env)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: model: ") and message in line and "Traceback" not in done.stderr


def test_the_command_that_is_told_fetches_it(hub: Hub, call: Callable[..., Any], tmp_path: Path) -> None:
    told = call("plan", "server=cpu", "model=org/tiny-moe", HF_HUB_OFFLINE="1").stderr
    words = shlex.split(told.partition("run: ")[2])
    command = Path(sys.executable).with_name(words[0])
    if not command.exists():
        command = Path(sys.executable).resolve().with_name(words[0])
    runner = [str(command)] if command.exists() else [sys.executable, "-m", "huggingface_hub.cli.hf"]
    subprocess.run([*runner, *words[1:]], env=environment(hub, tmp_path), check=True, capture_output=True, timeout=300)
    assert plan_of(call("plan", "--json", "server=cpu", "model=org/tiny-moe", HF_HUB_OFFLINE="1"))
    assert "pytorch_model.bin" not in hub.files() and "modeling_tiny.py" not in hub.files()


def test_what_does_not_fit_is_said_before_the_download(hub: Hub, call: Callable[..., Any], tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    config = json.loads((hub.repositories["org/tiny-moe"] / "config.json").read_text())
    config |= {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_routed_experts": 256}
    (large / "config.json").write_text(json.dumps(config))
    (large / "model.safetensors").write_bytes(b"weights")
    hub.repositories["org/large"] = large
    done = call("plan", "server=cpu", "model=org/large", "hub.download=true")
    assert done.returncode == 2
    assert "error: model: org/large does not fit: host memory: " in done.stderr
    assert "kt-launch fit model=org/large shows what other methods take" in done.stderr
    assert hub.files() == ["config.json"]


@pytest.mark.parametrize(("answer", "downloaded"), [("n", False), ("y", True)])
def test_a_person_at_a_terminal_is_asked(answer: str, downloaded: bool, hub: Hub, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = ("quantize", "model=org/tiny-moe", "kt.method=int8", "kt.cpuinfer=1", "--json")
    command = [sys.executable, "-P", "-m", "kt_launch.cli", *words]
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment(hub, tmp_path), stdin=theirs, stderr=theirs, stdout=subprocess.PIPE
    )
    os.close(theirs)
    shown = b""
    while b"? [y/N] " not in shown:
        shown += os.read(ours, 1 << 12)
    assert b" GB of org/tiny-moe to " in shown
    os.write(ours, f"{answer}\n".encode())
    reader = threading.Thread(target=_read_to_the_end, args=(ours,), daemon=True)
    reader.start()
    out, _ = started.communicate(timeout=300)
    assert started.returncode == (0 if downloaded else 2)
    assert bool(out) == downloaded
    if downloaded:
        assert json.loads(out)["made"] is True


def _read_to_the_end(terminal: int) -> None:
    """So that nobody waits for a full terminal."""
    try:
        while os.read(terminal, 1 << 12):
            pass
    except OSError:
        return


@pytest.mark.parametrize("name", ["org", "../../etc/passwd", "a b/c", "org/x@main"])
def test_what_is_no_name_on_the_hub(name: str, call: Callable[..., Any]) -> None:
    done = call("plan", "server=cpu", f"model.hub={name}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: model.hub: {name!r} is no name on the Hub, owner/name is expected." in done.stderr


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a" * 100_000, b"../../../model", b"\x1b[2J", b"", None])
def test_a_reference_that_no_tool_has_written_names_no_commit(content: bytes | None, tmp_path: Path) -> None:
    """None: a pipe, which would be waited on."""
    folder = tmp_path / "models--owner--name"
    for part in ("refs", "snapshots/abc"):
        (folder / part).mkdir(parents=True)
    reference = folder / "refs" / "main"
    reference.write_bytes(b"abc\n")
    assert find_snapshot(Repository("owner/name"), {"HF_HUB_CACHE": str(tmp_path)}) is not None
    reference.unlink()
    os.mkfifo(reference) if content is None else reference.write_bytes(content)
    assert find_snapshot(Repository("owner/name"), {"HF_HUB_CACHE": str(tmp_path)}) is None
