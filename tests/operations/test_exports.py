"""Exports are held against files; each is also read by the program it is for, where that is here, and says the same
launch again. `UPDATE_GOLDEN=1 pytest tests/operations/test_exports.py` writes the files anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hadolint import require_sound_dockerfile

from kt_launch.config.schema import Config, Server
from kt_launch.exports import FORMATS, Launch, read_launch, write_export
from kt_launch.exports.grafana import write_dashboard
from kt_launch.watching.metrics import METRICS
from kt_launch.watching.readiness import PROBE
from kt_model.errors import LaunchError
from kt_model.plan import LaunchPlan, Resolved

Operations = Any
GOLDEN = Path(__file__).parent / "golden"
ODD = "/models/50% off, $HOME (a=b)"


def launch_of(device: str, config: Config, folder: str, pools: int = 1) -> Launch:
    values = {
        "model.path": f"{folder}/model",
        "model.name": "DeepSeek_V2 Lite",
        "kt.weight_path": f"{folder}/model",
        "kt.cpuinfer": 48,
        "kt.threadpool_count": pools,
        "lora.west.path": f"{folder}/west",
        "server.device": device,
    }
    resolved = {key: Resolved(value, "default") for key, value in values.items()}
    argv = ("python", "-P", "-m", "kt_sglang.server", *config.server.extra_args)
    plan = LaunchPlan(config.model_dump(mode="json"), resolved, argv, {}, ())
    fixed = {"version": "0.1.0", "python": "/opt/kt/bin/python", "user": "serving"}
    return read_launch(plan, weights_made=True, memory_gib=42, **fixed)


LAUNCHES = {
    "cpu": launch_of(
        "cpu",
        Config(server=Server(metrics_port=0, extra_args=["--api-key", "env:KT_LAUNCH_API_KEY"], start_timeout_s=600.0)),
        "/models",
    ),
    "cuda": launch_of("cuda", Config(server=Server(host="0.0.0.0", port=8000, restarts=2)), ODD, pools=2),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("device", LAUNCHES)
def test_the_export_is_the_golden_one(device: str, form: str) -> None:
    file = GOLDEN / f"{device}.{form}"
    text = write_export(LAUNCHES[device], form)
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    if form in ("compose", "kubernetes"):
        assert list(yaml.safe_load_all(text)) == list(yaml.safe_load_all(file.read_text()))
    else:
        assert text == file.read_text()


@pytest.mark.parametrize(("experts", "cpus"), [("split", 98), ("rank0", 52)])
def test_a_container_asks_for_the_cpus_of_processes_that_compute_experts(experts: str, cpus: int) -> None:
    """And for one beside each process, or two where it waits for another one's experts."""
    config = Config.model_validate({"server": {"tp": 2}, "kt": {"tp_experts": experts}})
    launch = launch_of("cuda", config, "/models")
    (pod,) = [each for each in yaml.safe_load_all(write_export(launch, "kubernetes")) if each["kind"] == "Deployment"]
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == str(cpus)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_several_hosts_are_a_group_whose_pods_are_told_their_numbers() -> None:
    server = Server(tp=4, nodes=2, node_rank=0, rendezvous="10.0.0.1:29500")
    launch = launch_of("cuda", Config(server=server), "/models")
    group, service = yaml.safe_load_all(write_export(launch, "kubernetes"))
    assert group["kind"] == "LeaderWorkerSet"
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    (container,) = template["workerTemplate"]["spec"]["containers"]
    assert {"server.tp=4", "server.nodes=2"} < {*container["args"]}
    assert not [word for word in container["args"] if word.startswith(("server.node_rank", "server.rendezvous"))]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"


GROUP_FIELDS = {
    "spec": {"leaderWorkerTemplate", "networkConfig", "replicas", "rolloutStrategy", "startupPolicy"},
    "leaderWorkerTemplate": {
        *("leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy"),
        *("volumeClaimTemplates", "persistentVolumeClaimRetentionPolicy"),
    },
}
"""Of the CRD of LeaderWorkerSet 0.9 (kubernetes-sigs/lws, config/crd/bases); leaderWorkerTemplate and workerTemplate
are required. Templates are those of pods, as in a Deployment."""
RESTART_POLICIES = {"Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"}


def test_the_group_is_one_by_the_schema_of_its_kind() -> None:
    server = Server(tp=4, nodes=2, node_rank=0, rendezvous="10.0.0.1:29500", metrics_port=0)
    launch = launch_of("cuda", Config(server=server), "/models", pools=2)
    group, _ = yaml.safe_load_all(write_export(launch, "kubernetes"))
    assert {*group} == {"apiVersion", "kind", "metadata", "spec"}
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert {*group["spec"]} <= GROUP_FIELDS["spec"]
    template = group["spec"]["leaderWorkerTemplate"]
    assert "workerTemplate" in template and {*template} <= GROUP_FIELDS["leaderWorkerTemplate"]
    assert template["restartPolicy"] in RESTART_POLICIES and isinstance(template["size"], int)
    assert {*template["workerTemplate"]} <= {"metadata", "spec"}
    alone, _ = yaml.safe_load_all(write_export(replace(launch, ranks=replace(launch.ranks, hosts=1)), "kubernetes"))
    pod = alone["spec"]["template"]["spec"]
    assert {*template["workerTemplate"]["spec"]} == {*pod}, "a pod of the group has what a Deployment's has"


@pytest.mark.parametrize("form", FORMATS)
def test_restarts_that_were_typed_are_exported_as_they_are(form: str) -> None:
    def words(restarts: int | None) -> str:
        return write_export(launch_of("cpu", Config(server=Server(restarts=restarts)), "/models"), form)

    assert "server.restarts=0" in words(0)
    assert ("server.restarts=" in words(None)) == (form != "systemd")


@pytest.mark.parametrize("form", FORMATS)
def test_a_name_that_would_be_a_line_of_its_own_is_in_no_export(form: str) -> None:
    for odd in ("\nUSER root", "\x1b[2J", "\u202e"):
        with pytest.raises(LaunchError, match="a line break or a control character, which no export can hold"):
            write_export(launch_of("cpu", Config(), f"/models{odd}"), form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_with_a_colon_is_in_no_mount(form: str) -> None:
    launch = launch_of("cpu", Config(), "/models:old")
    if form == "systemd":
        assert "/models:old" in write_export(launch, form)
        return
    with pytest.raises(LaunchError, match=f"has a colon, at which {form} ends the path of a folder"):
        write_export(launch, form)


def probes(container: dict[str, Any]) -> list[str]:
    """Paths of all three: what waits for a start, what lets requests in, and the last resort; over HTTP."""
    asked = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    (port,) = [port["name"] for port in container["ports"] if port["name"] == "http"]
    assert {each["port"] for each in asked} == {port}
    return [each["path"] for each in asked]


def test_each_pod_is_asked_for_what_it_answers() -> None:
    """A router and a host that is a part of a server have other routes than a server."""

    def asked(server: Server, template: str = "template") -> list[str]:
        launch = launch_of("cpu", Config(server=server), "/models")
        spec = next(yaml.safe_load_all(write_export(launch, "kubernetes")))["spec"]
        return probes(spec.get("leaderWorkerTemplate", spec)[template]["spec"]["containers"][0])

    assert asked(Server()) == ["/ready", "/ready", "/health"]
    assert asked(Server(replicas=2)) == ["/readiness", "/readiness", "/health"]
    part = Server(tp=2, nodes=2, node_rank=0, rendezvous="10.0.0.1:29500")
    assert asked(part, "leaderTemplate") == ["/ready", "/ready", "/health"]
    assert asked(part, "workerTemplate") == ["/health", "/health", "/health"]


@pytest.mark.parametrize("device", LAUNCHES)
def test_yaml_says_the_words_and_the_folders(device: str) -> None:
    launch = LAUNCHES[device]
    words = launch.in_container().words(host="0.0.0.0", restarts=5)
    assert any("env:KT_LAUNCH_API_KEY" in word for word in words), "what listens on all addresses asks for a key"
    service = yaml.safe_load(write_export(launch, "compose"))["services"]["server"]
    assert [word.replace("$$", "$") for word in service["command"]] == words
    assert [mount.replace("$$", "$") for mount in service["volumes"][:2]] == [f"{f}:{f}:ro" for f in launch.folders]
    deployment, address = yaml.safe_load_all(write_export(launch, "kubernetes"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == words
    assert [mount["mountPath"] for mount in container["volumeMounts"][:2]] == list(launch.folders)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert address["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (device == "cuda")
    assert (service.get("cap_add") == ["SYS_NICE"]) == ("securityContext" in container) == (launch.pools > 1)
    image = write_export(launch, "docker")
    assert service["healthcheck"]["test"] == ["CMD", *PROBE]
    assert probes(container) == ["/ready", "/ready", "/health"]
    assert f"CMD {json.dumps(PROBE)}" in image
    assert ("--cap-add SYS_NICE" in image) == (launch.pools > 1)
    (command,) = re.findall(r"^CMD (.*)$", image, re.MULTILINE)
    assert json.loads(command) == words


@pytest.mark.parametrize("device", LAUNCHES)
def test_the_dockerfiles_linter_finds_nothing(device: str) -> None:
    require_sound_dockerfile(write_export(LAUNCHES[device], "docker"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("device", LAUNCHES)
def test_systemd_accepts_the_unit(device: str, tmp_path: Path) -> None:
    unit = tmp_path / "kt-launch-demo.service"
    unit.write_text(write_export(replace(LAUNCHES[device], python=sys.executable, user="root"), "systemd"))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=300)
    own = [line for line in checked.stderr.splitlines() if unit.name in line and "man" not in line.lower()]
    assert own == []


@pytest.mark.parametrize("name", ["mine", "v1.2"])
def test_what_is_exported_is_the_launch_that_was_asked_for(name: str, operations: Operations) -> None:
    from tiny_files import write_adapter, write_checkpoint

    checkpoint = write_checkpoint(operations.root / "a model, 50% (x=y)")
    adapter = write_adapter(operations.root / "west")
    words: tuple[str, ...] = ("model=auto", f"model.path={checkpoint}", f"lora.path={adapter}", f"lora.name={name}")
    override = """--preferred-sampling-params,{"a": [1, 2], "b": "it's"}"""
    words = (
        *words,
        "server=cpu",
        "kt.cpuinfer=1",
        "server.context_length=64",
        f"server.extra_args=[{override},a\\,'b,c']",
        "server.api_key=env:MINE",
    )
    target = operations.root / "out" / "compose.yaml"
    done = operations.call("action=export", "export.format=compose", f"export.path={target}", *words)
    assert (done.returncode, done.stdout) == (0, f"written: {target}\n"), done.stderr
    command = [word.replace("$$", "$") for word in yaml.safe_load(target.read_text())["services"]["server"]["command"]]
    plans = [
        json.loads(operations.call("action=plan", "format=json", *chosen, "server.port=11624").stdout)
        for chosen in (words, [word for word in command if not word.startswith(("server.host", "server.port"))])
    ]
    assert plans[0]["argv"] == plans[1]["argv"]
    assert plans[0]["env"] == plans[1]["env"]


@pytest.mark.parametrize("made", [True, False], ids=["made already", "made there"])
def test_quantized_experts_are_found_by_another_user(made: bool, operations: Operations) -> None:
    from tiny_files import write_checkpoint

    checkpoint = write_checkpoint(operations.root / "model")
    words = ("model=auto", f"model.path={checkpoint}", "server=cpu", "kt.method=int8", "kt.cpuinfer=1")
    if made:
        assert operations.call("action=quantize", *words).returncode == 0
    done = operations.call("action=export", "export.format=compose", *words, *([] if made else ["kt.prepare=true"]))
    assert done.returncode == 0, done.stderr
    service = yaml.safe_load(done.stdout)["services"]["server"]
    mounted = [volume.partition(":")[0] for volume in service["volumes"]]
    assert len([folder for folder in mounted if folder.startswith("/")]) == 1 + made
    assert ("kt.prepare=true" in service["command"]) == (not made)
    elsewhere = [word for word in service["command"] if not word.startswith(("server.host", "server.port"))]
    plan = operations.call("action=plan", "format=json", *elsewhere, KT_LAUNCH_CACHE=str(operations.root / "new"))
    assert plan.returncode == 0, plan.stderr
    found = json.loads(plan.stdout)["resolved"]["kt.weight_path"]["value"]
    assert Path(found).is_relative_to(operations.root / ("cache" if made else "new"))
    assert (found in mounted) == made


def test_a_container_gets_the_memory_that_the_plan_estimates_and_some_more(operations: Operations) -> None:
    from tiny_files import write_checkpoint

    checkpoint = write_checkpoint(operations.root / "model")
    words = ("model=auto", f"model.path={checkpoint}", "server=cpu", "kt.cpuinfer=1")
    done = operations.call("action=export", "export.format=kubernetes", *words)
    deployment, _ = yaml.safe_load_all(done.stdout)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    plan = json.loads(operations.call("action=plan", "format=json", *words).stdout)["resolved"]
    needed = sum(plan["fit"]["value"]["host memory"].values()) / 2**30
    allowed = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert 1.2 * needed + 2 <= allowed < 1.2 * needed + 3


def test_no_export_holds_a_secret(operations: Operations) -> None:
    from tiny_files import write_checkpoint

    checkpoint = write_checkpoint(operations.root / "model")
    words = ("model=auto", f"model.path={checkpoint}", "server=cpu", "server.extra_args=[--api-key,sk-hush]")
    for form in FORMATS:
        done = operations.call("action=export", f"export.format={form}", *words)
        assert done.returncode == 0, done.stderr
        assert "sk-hush" not in done.stdout
        assert "KT_LAUNCH_API_KEY" in done.stdout


def test_keys_are_named_where_they_are(operations: Operations) -> None:
    """By the variable, or the file's path; a container gets that file."""
    from tiny_files import write_checkpoint

    checkpoint = write_checkpoint(operations.root / "model")
    file = operations.root / "elsewhere" / "admin key"
    file.write_text("sk-still")
    keys = ("server.api_key=env:MINE", "server.admin_key=file:admin key")
    for form in FORMATS:
        words = ("model=auto", f"model.path={checkpoint}", "server=cpu", *keys)
        done = operations.call("action=export", f"export.format={form}", *words, MINE="sk-hush")
        assert done.returncode == 0, done.stderr
        assert "sk-" not in done.stdout + done.stderr
        assert "server.api_key=env:MINE" in done.stdout
        assert f"server.admin_key=file:{file}" in done.stdout
        mounted = {
            "docker": f" -v '{file}:{file}:ro'",
            "compose": f"- {file}:{file}:ro",
            "kubernetes": f"path: {file}\n",
        }
        assert mounted.get(form, "") in done.stdout


def test_the_dashboard_names_only_metrics_that_exist(operations: Operations) -> None:
    text = write_dashboard()
    assert operations.call("action=export", "export.format=grafana").stdout == text
    dashboard = json.loads(text)
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    own = {name for expression in asked for name in re.findall(r"\bkt_launch_\w+", expression)}
    assert own and own <= set(METRICS)
    stock = {name for expression in asked for name in re.findall(r"\bsglang:\w+", expression)}
    import sglang

    (root,) = sglang.__path__
    source = "".join(file.read_text() for file in (Path(root) / "srt" / "observability").glob("*.py"))
    assert {name for name in stock if f'"{name.removesuffix("_bucket")}"' not in source} == set()
    assert {"sglang:time_to_first_token_seconds_bucket", "sglang:token_usage", "sglang:lora_pool_slots_used"} <= stock
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and all(panel["targets"] for panel in dashboard["panels"])
