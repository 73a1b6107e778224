"""What people type in the first hour that is not quite right: each gets one line that says what to type instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

Launch = Callable[..., Any]
NO_USER = "~nobody-of-this-name"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: models/mine and adapters/west, and the same below names with blanks and umlauts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for model, lora in (("models/mine", "adapters/west"), ("my files/Über Modell", "my files/grüße west")):
        write_checkpoint(tmp_path / model)
        write_adapter(tmp_path / lora)
    (tmp_path / "models/x.gguf").touch()
    (tmp_path / "run.yaml").write_text("model: {path: models/mine}\n")
    return tmp_path


TYPED = {
    # a name or a folder that is not quite it
    "model=models/minee": "model: models/minee is neither a folder here nor .* Did you mean model=HOME/models/mine[?]",
    "model=./model/mine": "model.path: no folder HOME/model/mine, .* Did you mean model.path=HOME/models/mine[?]",
    "model=HOME/models/Mine": "model.path: no folder .* Did you mean model.path=HOME/models/mine[?]",
    "model=models": "model.path: HOME/models has no config.json. Set model.path=HOME/models/mine.",
    "model=.": "model.path: HOME has no config.json. Choose a folder that has one.",
    "model=adapters/west": "model.path: .* It is an adapter: set lora=HOME/adapters/west, and model.path to its base",
    "model=models/mine/config.json": "model.path: .* is a file, .* Set model.path=HOME/models/mine.",
    "model=models/x.gguf": "model.path: .* is a file, .* Choose a folder of safetensors files; GGUF is not read.",
    # how it is written
    "model=": "model: no preset given, .* a shell's variable that is not set gives nothing.",
    "model=$NOPE/mine": "model.path: no folder .* [$]NOPE stands in it as typed: ",
    "model=~nobody-of-this-name/mine": "model.path: no folder .* There is no user nobody-of-this-name; ",
    r"model=C:\models\mine": "model: .* It is a Windows path; in WSL that folder is /mnt/c/models/mine.",
    "model=C:/models/mine": "model.path: .* in WSL that folder is /mnt/c/models/mine.",
    r"model=models\mine": r"model: .* Folders are separated by /: model=models/mine.",
    r"model=my\ files/Über\ Modell": 'model.path: no folder .* Set "model.path=HOME/my files/Über Modell".',
    "model=“models/mine”": "model.path: no folder .* Set model.path=HOME/models/mine.",
    "model= models/mine": "model.path: no folder .* Set model.path=HOME/models/mine.",
    "model==models/mine": "model.path: no folder .* Set model.path=HOME/models/mine.",
    "'model=models/mine'": "'model=models/mine': .* Leave the quotes out: model=models/mine$",
    "model=models/mine,": "model=models/mine,: .* Set model=models/mine.",
    "model:models/mine": "model:models/mine: .* Set model=models/mine.",
    "MODEL=models/mine": "MODEL: no such key or group. Did you mean model=models/mine[?]",
    "models=models/mine": "models: no such key or group. Did you mean model=models/mine[?]",
    "model=https://huggingface.co/Qwen/Qwen3-30B-A3B/tree/main": ".* on the Hub it is model=Qwen/Qwen3-30B-A3B.",
    "model=file:///models/mine": "model.path: .* Set model.path=/models/mine.",
    "model=Qwen/Qwen3-30B-A3B/": "model: Qwen/Qwen3-30B-A3B is neither a folder here nor in the Hub's cache ",
    "model=/x lora=/y": "model.path: .* lora= is a separate argument: do not quote both together.",
    "plan model=/x": "plan model=/x: .* Put no quotes around several words: kt-launch plan model=/x$",
    "run.yaml": "run.yaml: .* Did you mean --config run.yaml[?]",
}


def one_line(ended: Any, expected: str, home: Path) -> None:
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert re.match(f"error: {expected.replace('HOME', re.escape(str(home)))}", line), line


@pytest.mark.parametrize(("typed", "expected"), TYPED.items())
def test_the_model(typed: str, expected: str, launch: Launch, home: Path) -> None:
    one_line(launch("plan", typed.replace("HOME", str(home)), "server=cpu"), expected, home)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            ("adapters/west", "my/west"),
            "lora: adapters/west and my/west are typed, and the last one alone would be served",
        ),
        (
            ("[west_all,adapters/west]", "x"),
            ".* Set .lora=.west_all,adapters/west,x.. for both, or leave out what is not",
        ),
        (("a", "b", "a", "c"), "lora: a and b and c are typed, .* Set .lora=.a,b,c.. for all, or leave out"),
    ],
)
def test_adapters_that_are_typed_one_by_one(typed: tuple[str, ...], expected: str, launch: Launch, home: Path) -> None:
    one_line(launch("plan", "model=models/mine", *(f"lora={each}" for each in typed)), expected, home)


@pytest.mark.parametrize("typed", [("adapters/west", "adapters/west"), ("adapters/west", "none")])
def test_one_adapter_typed_twice_or_switched_off_is_meant(typed: tuple[str, ...], launch: Launch, home: Path) -> None:
    ended = launch("plan", "server=cpu", "model=models/mine", *(f"lora={each}" for each in typed))
    assert (ended.code, "lora.west.path" in ended.out) == (0, typed[-1] != "none")


@pytest.mark.parametrize("action", ["fit", "inspect", "quantize", "chat"])
@pytest.mark.parametrize(
    "typed", ["model=./models/minee", "model=C:/models/mine", f"model={NO_USER}/mine", "model=models/mine/config.json"]
)
def test_other_commands_say_the_same(action: str, typed: str, launch: Launch, home: Path) -> None:
    expected = TYPED.get(typed, "model.path: no folder .*")
    words = {"inspect": ["lora=adapters/west"], "quantize": ["kt.method=int8"]}.get(action, [])
    one_line(launch(action, typed, *words, *([] if action in ("fit", "inspect") else ["server=cpu"])), expected, home)


def test_model_and_adapter_in_each_others_place(launch: Launch, home: Path) -> None:
    for action in ("plan", "inspect"):
        ended = launch(action, "model=adapters/west", "lora=models/mine")
        said = ended.err.splitlines()
        assert (ended.code, ended.out, len(said)) == (2, "", 2)
        assert "It is an adapter: set lora=" in said[0] and "It is a checkpoint: set model=" in said[1]


def test_words_that_belong_together(launch: Launch, home: Path) -> None:
    blanks = launch("plan", "model=my", "files/Über", "Modell", "lora=adapters/west")
    one_line(blanks, 'model: .* Set "model=my files/Über Modell"', home)
    listed = launch("plan", "model=models/mine", "lora=[adapters/west", "adapters/chef]")
    one_line(listed, 'lora: .* Set "lora=\\[adapters/west,adapters/chef\\]"', home)


def test_blanks_and_umlauts_make_plain_names(launch: Launch, home: Path) -> None:
    made = launch("plan", "--json", "model=my files/Über Modell", "lora=my files/grüße west", "server=cpu")
    assert made.value("model.name") == "Uber-Modell"
    assert made.value("lora.grusse-west.path") == str(home / "my files/grüße west")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("config", "--config", f"{NO_USER}/run.yaml"), "--config: .* cannot be read "),
        (("config", "--config", "models"), "--config: HOME/models is a folder, but a file is expected. "),
        (
            ("plan", "--config", "models/mine/config.json"),
            "--config: .* is not a config of kt-launch: it has .* and .*more",
        ),
        (("plan", "--config-dir", f"{NO_USER}/x"), "--config-dir: no folder HOME/~"),
        (("status", f"run={NO_USER}/x"), "run: no run "),
        (("logs", "nosuch"), "run: no run nosuch in "),
        (("stop", "no/such"), "run: no run no/such in "),
        (("diff", "one", "two"), "run: no run one in "),
        (("explain", "kt.cpuinfr"), "key: no key kt.cpuinfr. Did you mean kt-launch explain kt.cpuinfer[?]"),
        (("explain", "kt.cpuinfr=3"), "kt.cpuinfr: no such key or group. Did you mean kt.cpuinfer=3[?]"),
        (("inspect", "model/mine"), "model/mine: .* set model=model/mine."),
        (
            ("chat", "model=models/mine", "lora=adapters/west", "chat.adapter=wst"),
            "chat.adapter: no adapter wst .*=west[?]",
        ),
    ],
)
def test_other_words(words: tuple[str, ...], expected: str, launch: Launch, home: Path) -> None:
    one_line(launch(*words), expected, home)


@pytest.mark.parametrize(
    ("variable", "value", "words", "expected"),
    [
        ("KT_LAUNCH_MODELS", f"{NO_USER}/x", ("plan", "model=deepseek_v2_lite"), "model.path: no folder HOME/~"),
        (
            "KT_LAUNCH_MODELS",
            "",
            ("plan", "model=deepseek_v2_lite"),
            "model.path: .* none is given. Set KT_LAUNCH_MODELS",
        ),
        ("KT_LAUNCH_RUNS", "run.yaml", ("runs",), "KT_LAUNCH_RUNS: HOME/run.yaml is a file, but a folder "),
        ("KT_LAUNCH_CONFIG_DIR", f"{NO_USER}/x", ("plan",), "KT_LAUNCH_CONFIG_DIR: no folder HOME/~"),
    ],
)
def test_variables(
    variable: str,
    value: str,
    words: tuple[str, ...],
    expected: str,
    launch: Launch,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    one_line(launch(*words), expected, home)


def test_a_home_that_is_not_known_ends_nothing(launch: Launch, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", f"{NO_USER}/x")
    assert launch("cache").code == 0
    assert launch("plan", "model=models/mine", "server=cpu").code == 0
