"""kt-launch as it is typed: paths, folders of one's own, multirun, help, and what it leaves unimported."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import fused_tensors, write_adapter, write_checkpoint

import kt_launch
from kt_launch.config.actions import ACTIONS
from kt_launch.config.schema import read_fields

Launch = Callable[..., Any]
ODD_NAMES = [
    "a b",
    "a=b",
    "a,b",
    "~a",
    "a(b)",
    "[a]",
    "{a: b}",
    "it's",
    'a"b',
    "a\\b",
    "a:b",
    "null",
    "1e5",
    "ä",
    "a#b",
    "$a",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_paths_are_taken_as_typed(name: str, launch: Launch, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / name / "model")
    lora = write_adapter(tmp_path / name / "lora")
    made = launch(
        "action=plan", "format=json", "model=auto", "server=cpu", f"model.path={model}", f"lora.path={lora}",
        "lora.name=x",
    )  # fmt: skip
    assert made.value("model.path") == str(model)
    assert f"x={lora}" in made.plan["argv"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_adapters_paths_in_a_dictionary_too(name: str, plan: Launch, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / name)
    assert plan(f"lora.adapters.mine.path={lora}").value("lora.mine.path") == str(lora)


def test_adapters_as_a_dictionary(plan: Launch, adapter: Path) -> None:
    made = plan(f"lora.adapters={{mine: {{path: {adapter}}}}}")
    assert made.value("lora.mine.path") == str(adapter)
    assert made.source("lora.mine.path").startswith("command line: lora.adapters=")


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if not set(name) & set("{}\"'")])
def test_adapters_in_a_list_with_their_paths(name: str, plan: Launch, tmp_path: Path) -> None:
    mine, other = write_adapter(tmp_path / name), write_adapter(tmp_path / "other")
    chosen = plan(f"lora=[{{name: mine, path: '{mine}'}},{{path: {other}, name: other}}]")
    assert chosen.value("lora.mine.path") == str(mine)
    assert chosen.value("lora.other.path") == str(other)


def test_an_adapter_in_a_list_may_have_a_layout_of_its_own(plan: Launch, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "a", fused_tensors(), target_modules=[])
    chosen = plan(f"lora=[{{name: mine, path: {lora}, layout: grouped_by_expert}}]")
    assert chosen.value("lora.mine.layout") == "grouped_by_expert"
    assert chosen.source("lora.mine.layout") == "command line: lora.adapters.mine.layout=grouped_by_expert"


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("{name: a}", "lora: {name: a} cannot be read, expected {name: <its name>, path: <its folder>}"),
        ("{name: a, path: /x, rank: 3}", "lora: {name: a, path: /x, rank: 3} cannot be read"),
        ("{name: a, path: /x},{name: a, path: /y}", "lora: two adapters are named a"),
        ("{name: a b, path: /x}", "lora: 'a b' cannot be used in a key"),
    ],
)
def test_adapters_in_a_list_that_cannot_be_read(typed: str, problem: str, launch: Launch) -> None:
    done = launch("action=plan", f"lora=[{typed}]")
    assert done.code == 2
    assert problem in done.err


def test_names_made_from_folders_can_stand_in_a_request(launch: Launch, tmp_path: Path) -> None:
    model, lora = write_checkpoint(tmp_path / "my model (1)"), write_adapter(tmp_path / "my=lora")
    own = ("action=plan", "format=json", "model=auto", "server=cpu")
    made = launch(*own, f"model.path={model}", f"lora.path={lora}")
    assert made.value("model.name") == "my-model-1"
    assert made.value("lora.my-lora.path") == str(lora)


def test_a_tilde_is_the_home(plan: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lora = write_adapter(tmp_path / "l")
    assert plan("lora.path=~/l").value("lora.l.path") == str(lora)


def test_the_printed_command_survives_a_shell(launch: Launch, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "it's a (model)")
    own = ("action=plan", "model=auto", "server=cpu", f"model.path={model}", "model.name=m", "server.port=11567")
    table = launch(*own)
    content = launch(*own, "format=json").plan
    words = shlex.split(table.out.strip().splitlines()[-1])
    assert words == [*(f"{name}={value}" for name, value in content["env"].items()), *content["argv"]]


def test_the_table_shows_every_value(plan: Launch, launch: Launch, checkpoint: Path) -> None:
    resolved = plan().plan["resolved"]
    shown = launch("action=plan", "model=auto", "server.device=cpu", f"model.path={checkpoint}").out
    assert [key for key in resolved if key not in shown and key != "fit.free"] == []
    assert "free now" in shown, "fit.free is a column"


def config_folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    return tmp_path / "own"


def test_a_folder_of_ones_own_adds_choices(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    folder = config_folder(tmp_path, {"model/mine.yaml": f"path: {checkpoint}\nname: mine\n"})
    made = launch("--config-dir", str(folder), "action=plan", "format=json", "model=mine", "server=cpu")
    assert made.value("model.name") == "mine"
    assert made.source("model.path") == f"preset file: {folder}/model/mine.yaml"
    assert "lora.west.path" not in made.plan["resolved"]


def test_a_folder_of_ones_own_overrides_a_shipped_choice(
    launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "model/demo.yaml": f"path: {checkpoint}\nname: other\n",
        "lora/demo_west.yaml": f"# @package lora.adapters.west\npath: {adapter}\n",
    }
    monkeypatch.setenv("KT_LAUNCH_CONFIG_DIR", str(config_folder(tmp_path, files)))
    made = launch("action=plan", "format=json", "server.device=cpu")
    assert made.value("model.name") == "other"
    assert made.value("lora.west.path") == str(adapter)
    assert made.source("lora.west.path").endswith("own/lora/demo_west.yaml")


def test_a_model_of_ones_own_may_bring_its_adapters(
    launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    files = {
        "model/mine.yaml": f"path: {checkpoint}\n",
        "lora/with_mine.yaml": "defaults:\n  - first\n",
        "lora/first.yaml": f"# @package lora.adapters.first\npath: {adapter}\n",
    }
    own = (
        f"--config-dir={config_folder(tmp_path, files)}",
        "action=plan",
        "format=json",
        "model=mine",
        "server=cpu",
    )
    assert launch(*own).value("lora.first.path") == str(adapter)
    assert "lora.first.path" not in launch(*own, "lora=none").plan["resolved"]


def test_two_adapters_at_once(launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    files = {f"lora/{name}.yaml": f"# @package lora.adapters.{name}\npath: {adapter}\n" for name in ("a", "b")}
    folder = config_folder(tmp_path, files)
    made = launch(
        f"--config-dir={folder}", "action=plan", "format=json", "model=auto", f"model.path={checkpoint}",
        "server=cpu", "lora=[a,b]",
    )  # fmt: skip
    assert (made.value("lora.a.path"), made.value("lora.b.path")) == (str(adapter), str(adapter))
    assert made.source("lora.b.path") == f"preset file: {folder}/lora/b.yaml"
    assert made.value("lora.max_per_batch") == 3


def test_multirun_plans_one_after_another(plan: Launch, launch: Launch, checkpoint: Path) -> None:
    own = ("-m", "action=plan", "format=json", "model=auto", f"model.path={checkpoint}", "server=cpu")
    made = launch(*own, "kt.cpuinfer=1", "server.host=127.0.0.1,127.0.0.2")
    assert made.code == 0
    hosts = [json.loads(line)["resolved"]["server.host"] for line in made.out.splitlines()]
    assert [host["value"] for host in hosts] == ["127.0.0.1", "127.0.0.2"]
    assert hosts[1]["source"] == "command line: server.host=127.0.0.2"


def test_loggers_of_the_process_speak_after_a_sweep(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    own, level = logging.getLogger("made.before"), logging.root.level
    assert launch("-m", "action=schema", "kt.cpuinfer=1,2").code == 0
    own.warning("heard")
    assert (caplog.messages, logging.root.level) == (["heard"], level)


def test_multirun_goes_on_after_a_mistake_and_ends_with_the_worst_code(launch: Launch, checkpoint: Path) -> None:
    own = ("-m", "action=plan", "format=json", "model=auto", f"model.path={checkpoint}", "server=cpu")
    made = launch(*own, "kt.cpuinfer=1,0,1")
    assert made.code == 2
    assert len(made.out.splitlines()) == 2
    assert "kt.cpuinfer: 0 threads" in made.err
    assert [line.rpartition(" ")[2] for line in made.err.splitlines() if ": exit " in line] == ["0", "2", "0"]


def test_ctrl_c_in_one_job_ends_a_multirun(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_launch.actions import schema

    ran = []

    def interrupted(job: Any) -> int:
        ran.append(job.number)
        return 130

    monkeypatch.setattr(schema, "run", interrupted)
    assert launch("-m", "action=schema", "kt.cpuinfer=1,2,3").code == 130
    assert ran == [0]


def test_a_bug_in_one_job_is_a_traceback_and_not_the_end(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_launch.actions import schema

    monkeypatch.setattr(schema, "run", lambda job: 1 // job.number)
    made = launch("-m", "action=schema", "kt.cpuinfer=1,2")
    assert made.code == 1
    assert "ZeroDivisionError" in made.err
    assert "job 1: action=schema kt.cpuinfer=2: exit 1" in made.err


def test_multirun_over_paths(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    second = write_checkpoint(tmp_path / "second one")
    made = launch("-m", "action=plan", "format=json", "model=auto", "server=cpu", f"model.path={checkpoint},{second}")
    paths = [json.loads(line)["resolved"]["model.path"]["value"] for line in made.out.splitlines()]
    assert paths == [str(checkpoint), str(second)]


def test_multirun_over_lists_of_text(launch: Launch, checkpoint: Path) -> None:
    model, lists = f"model.path={checkpoint}", "server.extra_args=[--log-level,a=b],[],['--x']"
    ended = launch("-m", "action=plan", "format=json", "model=auto", model, "server=cpu", lists)
    assert ended.code == 0, ended.err
    planned = [json.loads(line)["config"]["server"]["extra_args"] for line in ended.out.splitlines()]
    assert planned == [["--log-level", "a=b"], [], ["--x"]]
    alone = launch("plan", "model=auto", model, "server.extra_args=[--a],[--b]")
    assert alone.code == 2
    assert "are several values, but a single launch takes one. Add -m to run one after another." in alone.err


def test_a_mistake_in_a_sweep_is_found_before_its_first_job(launch: Launch, checkpoint: Path) -> None:
    made = launch("-m", "action=plan", "model=auto", f"model.path={checkpoint}", "lora=none,demo_wst")
    assert made.code == 2
    assert made.out == ""
    assert "Did you mean lora=demo_west?" in made.err


EXTRA = {
    "--log-level,debug,--random-seed,7": ["--log-level", "debug", "--random-seed", "7"],
    " --log-level , debug ": ["--log-level", "debug"],
    """--preferred-sampling-params,{"a": 1, "b": [1, "x, {y"]}""": [
        "--preferred-sampling-params",
        """{"a": 1, "b": [1, "x, {y"]}""",
    ],
    "--chat-template,'/a b, c.jinja'": ["--chat-template", "/a b, c.jinja"],
    "--stop,it's,a}": ["--stop", "it's", "a}"],
}


@pytest.mark.parametrize("typed", EXTRA)
def test_extra_arguments_reach_sglang_as_text(typed: str, plan: Launch) -> None:
    argv = plan(f"server.extra_args=[{typed}]").plan["argv"]
    assert argv[-len(EXTRA[typed]) :] == EXTRA[typed]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_page_names_every_action_choice_and_key(flag: str, launch: Launch) -> None:
    page = launch(flag).out
    names = [f"\n  {name} " for name in ACTIONS] + [key for key, _ in read_fields() if key != "action.name"]
    names += ["demo", "deepseek_v2_lite", "west_all", "int4", "--config-dir", "-m"]
    names += [f"KT_LAUNCH_{name}" for name in ("MODELS", "LORAS", "RUNS", "CACHE", "CONFIG_DIR")]
    assert [name for name in names if name not in page] == []


def test_every_key_has_help() -> None:
    assert [key for key, field in read_fields() if not field.description] == []


def test_cfg_prints_the_composed_config(launch: Launch) -> None:
    shown = launch("--cfg", "job", "model=auto", "model.path=/x y")
    assert "path: /x y\n" in shown.out


PROBE = """
import sys
from kt_launch.cli import main
code = main(sys.argv[1:])
heavy = sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "sglang", "transformers"))
print(heavy, file=sys.stderr)
sys.exit(code)
"""


def test_planning_imports_no_torch_and_no_sglang(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    own = ["action=plan", "format=json", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *own], cwd=tmp_path, capture_output=True, text=True, env=_env(), check=True
    )
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["resolved"]["lora.west.rank"]["value"] == 2


def test_a_mistake_ends_the_process_with_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kt_launch.cli", "kt.cpuinfr=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_env())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


INTERRUPTED = """
import runpy, signal, sys

def interrupt(event, arguments):
    if event == "import" and arguments[0] == "kt_launch.config.secrets":
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(interrupt)
runpy.run_module("kt_launch", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_while_the_command_is_loading_ends_it_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_env())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(kt_launch.__file__).parent.parent)}


def test_an_action_is_run_by_its_name(launch: Launch, plan: Launch, checkpoint: Path) -> None:
    own = ("format=json", "server.device=cpu", "model=auto", f"model.path={checkpoint}", "server.port=11567")
    written_out = plan("server.port=11567")
    for words in (("plan", *own), (*own, "plan"), ("plan", "action=plan", *own, "plan")):
        named = launch(*words)
        assert (named.code, named.plan["argv"]) == (0, written_out.plan["argv"]), named.err


def test_an_action_by_its_name_goes_with_flags(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model:\n  path: {checkpoint}\nserver:\n  device: cpu\naction:\n  name: serve\n"
    )
    kept = ("--config", str(tmp_path / "run.yaml"))
    assert launch(*kept, "plan", "format=json").value("model.path") == str(checkpoint)
    swept = launch("plan", "-m", *kept, "format=json", "server.context_length=64,128")
    assert (swept.code, len(swept.out.splitlines())) == (0, 2), swept.err
    assert "job 1: model=auto lora=none" in swept.err and "action=plan" in swept.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("plan", "serve"), "plan and serve"),
        (("plan", "action=serve"), "plan and action=serve"),
        (("action=serve", "plan"), "plan and action=serve"),
        (("-m", "plan", "action=plan,bench"), "plan and action=plan,bench"),
    ],
)
def test_two_actions_are_one_error(words: tuple[str, ...], named: str, launch: Launch) -> None:
    made = launch(*words)
    assert made.code == 2
    assert made.err == f"error: action: {named} are typed, but one is expected. Leave the others out.\n"


def test_pages_by_their_names(launch: Launch) -> None:
    assert launch("help").out == launch("--help").out
    of_plan = launch("--help", "action=plan").out
    assert [launch(*words).out for words in (("help", "plan"), ("plan", "--help"), ("plan", "help"))] == [of_plan] * 3
    assert launch("version").out == launch("-V").out == launch("--version").out
    slip = launch("help", "quantise")
    assert (slip.code, slip.err) == (2, "error: action: no action quantise. Did you mean kt-launch help quantize?\n")
    of_key = launch("help", "kt.cpuinfer")
    told = "error: help: kt.cpuinfer is a key, but an action is expected. Type kt-launch explain kt.cpuinfer.\n"
    assert (of_key.code, of_key.err) == (2, told)


@pytest.mark.parametrize(
    "word",
    [
        "kt.prepare=true",
        "lora.path=/a b's/ü",
        "server.extra_args=['--log-level','a True']",
        "server.extra_args=['True']",
        "model.name=True",
    ],
)
def test_a_job_is_told_in_words_that_can_be_pasted(word: str, launch: Launch) -> None:
    """Pasted, it is the same job: Hydra's sweepers write true as Python does."""
    made = launch("schema", "-m", word, "kt.cpuinfer=1,2")
    line = next(line for line in made.err.splitlines() if line.startswith("job 1: ")).removeprefix("job 1: ")
    assert shlex.split(line) == [*(["lora=none"] if "lora" in word else []), "action=schema", word, "kt.cpuinfer=2"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_sweep_whose_folder_has_an_odd_name(
    name: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(tmp_path / name))
    made = launch("schema", "-m", "kt.cpuinfer=1,2")
    assert made.code == 0, made.err
    (sweep,) = (tmp_path / name / "sweeps").iterdir()
    assert len([*(sweep / "rows").iterdir()]) == 2


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if not re.search(r"[~$\\]", name)])  # slips of their own
def test_what_was_meant_is_told_as_a_shell_reads_it(name: str, launch: Launch, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / name / "model")
    said = launch("plan", "model=auto", f"model.path={model.with_name('modle')}").err
    (word,) = shlex.split(said.partition("Did you mean ")[2].rstrip("\n").removesuffix("?"))
    assert word == f"model.path={model}"


def test_a_value_that_is_refused_is_told_as_it_is_typed(launch: Launch) -> None:
    assert "server.port: got null, but" in launch("plan", "server.port=null").err
    assert "kt.cpuinfer: got [1,true,null], but" in launch("plan", "kt.cpuinfer=[1,true,null]").err


def test_an_action_by_a_name_with_a_slip(launch: Launch) -> None:
    assert "pln: an action or key=value is expected. Did you mean kt-launch plan?" in launch("pln", "model=demo").err


@pytest.mark.parametrize(
    ("swept", "values"),
    [("kt=glob(int*)", ["int4", "int8"]), ("kt.method=glob(*,exclude=int8)", ["bf16", "int4"])],
)
def test_a_sweep_over_what_a_pattern_matches(swept: str, values: list[str], plan: Launch, tmp_path: Path) -> None:
    made = plan("-m", swept, "kt.prepare=true")
    assert made.code == 0, made.err
    assert [json.loads(line)["resolved"]["kt.method"]["value"] for line in made.out.splitlines()] == values


SWEPT = {
    "kt=glob(fp*)": "kt: glob(fp*) matches nothing, expected one of auto, bf16, int4, int8. "
    "Set kt=glob(*) for all of them.",
    "lora=glob(with*)": "lora: glob(with*) matches nothing, expected one of demo_west, none, west_all. "
    "Set lora=glob(*) for all of them.",
    "model.name=glob(*)": "model.name: glob chooses among presets or known values, but this key takes any value. "
    "Set model.name=<one>,<another>.",
    "kt.cpuinfer=range(5,1)": "kt.cpuinfer: range(5,1) has no values: it counts from the first number up to, but not "
    "including, the second. Set kt.cpuinfer=<one>,<another>.",
    "kt.cpuinfer=range(1,5,0)": "kt.cpuinfer: range(1,5,0) has steps of 0. Set kt.cpuinfer=range(<first>,<end>).",
    "server.port=range(0,99999999999)": "server.port: range(0,99999999999) has more than 10000 values. "
    "Set server.port=range(<first>,<end>,<step>).",
    "kt.cpuinfer=interval(1,2)": "-m: interval(…) needs a sweeper that chooses values from it. "
    "Add sweep=optuna, or list the values: kt.cpuinfer=8,16.",
    "kt.method=choice()": "kt.method: the value choice() cannot be read. ",
}


@pytest.mark.parametrize("swept", SWEPT)
def test_a_sweep_without_values_is_told_before_its_first_job(swept: str, launch: Launch) -> None:
    made = launch("-m", "plan", swept)
    assert (made.code, made.out) == (2, "")
    assert made.err.startswith(f"error: {SWEPT[swept]}")
