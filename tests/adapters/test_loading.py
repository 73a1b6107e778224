"""A server that was started without adapters, with room for some: they are loaded by the commands of the docs page,
checked and proven before anybody can ask for them, refused in one line, put aside and read again; and how often each
expert was chosen is recorded.

Its contexts are longer than the model was made for, which SGLang's own variable allows.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from against_float32 import Reference, reference_of, require_match
from docs_pages import code_lines
from launching import Running, launched, read_json
from tiny_checkpoints import write_checkpoint
from written import write_converted, write_fused, write_per_expert

import kt_launch
from kt_launch.cli import main
from kt_model.expert_profile import read_profile

pytestmark = pytest.mark.server
PAGE = Path("docs/hot-loading.md")
ATTENTION = [".q_proj", ".kv_a_proj_with_mqa", ".kv_b_proj", ".o_proj"]
EXPERTS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]
OUTSIDE = Path(kt_launch.__file__).parent / "demo" / "west"
"""An adapter that is in no folder of this server's."""
PROMPT = "The quick brown fox jumps over"


@dataclass
class Served:
    """A server with two slots, of which no more than two adapters stay loaded."""

    running: Running
    folder: Path

    def load(self, name: str, path: Path) -> httpx.Response:
        return self.running.client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> None:
        self.running.client.post("/unload_lora_adapter", json={"lora_name": name}).raise_for_status()

    def models(self) -> list[str]:
        return [one["id"] for one in self.running.client.get("/v1/models").json()["data"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("loading")
    model = write_checkpoint("deepseek_v2", folder / "model")
    write_per_expert(folder / "west" / "checkpoint-20", model, [*EXPERTS, *ATTENTION], seed=1, size=0.1)
    write_per_expert(folder / "west" / "checkpoint-5", model, EXPERTS, seed=2)
    (folder / "west" / "moe_lora.pt").write_bytes(b"\x80 a pickle")
    write_fused(folder / "fused", model, seed=3, size=0.1)
    write_per_expert(folder / "attention", model, ATTENTION, seed=4, size=0.1)
    words: tuple[str, ...] = (
        "model=auto",
        f"model.path={model}",
        "model.name=deepseek-v2-lite",
        "lora=none",
        "lora.max_rank=8",
        f"lora.allow=[{tmp_path_factory.getbasetemp()}]",
    )
    more: tuple[str, ...] = ("server.context_length=4200", "server.extra_args=[--max-loaded-loras,2]")
    more += ("proof.whole_model=off", "proof.text=warn", f"kt.record_experts={folder / 'recorded.json'}")
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    with launched(*words, *more, runs=folder / "runs", env=env) as running:
        yield Served(running, folder)


@pytest.fixture(scope="module")
def reference(served: Served) -> Reference:
    folder = served.folder
    adapters = {"west": folder / "west" / "checkpoint-20", "fused": folder / "fused", "attention": folder / "attention"}
    return reference_of(folder / "model", adapters)


def test_without_an_adapter_the_proof_is_the_bases(served: Served) -> None:
    resolved = read_json(served.running.run_folder / "plan.json")["resolved"]
    assert (resolved["lora.max_rank"]["value"], resolved["lora.max_per_batch"]["value"]) == (8, 2)
    assert resolved["lora.target_modules"]["value"] == [
        "q_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    proof = read_json(served.running.run_folder / "proof.json")
    assert (proof["difference"], list(proof["reference_error"])) == ({}, ["base"])
    assert all(layer["lora_layer"] == "kt_sglang.adapters.lora" for layer in served.running.layers())


def test_a_router_is_told_that_it_is_proven(served: Served) -> None:
    answer = served.running.client.get("/health_proven")
    assert (answer.status_code, answer.json()) == (200, {"proven": True})


def page_requests() -> list[tuple[str, dict[str, Any]]]:
    """(route, body) of the page's commands, in their order."""
    lines = "\n".join(code_lines(PAGE))
    commands = [shlex.split(one)[1:] for one in re.findall(r"^curl [^']*'[^']*'[^']*'[^']*'", lines, re.MULTILINE)]
    return [(url.removeprefix("http://127.0.0.1:30000"), json.loads(words[-1])) for url, *words in commands]


def test_the_pages_commands_load_ask_and_unload(served: Served, reference: Reference) -> None:
    (load, loaded), (ask, asked), (unload, unloaded) = page_requests()
    loaded["lora_path"] = str(served.folder / "west")
    answer = served.running.client.post(load, json=loaded)
    assert answer.status_code == 200, answer.text
    found = answer.json()["adapter"]
    proof = found.pop("proof")
    assert found == {
        "name": "west",
        "path": str(served.folder / "west" / "checkpoint-20"),
        "checkpoint": f"checkpoint-20 (probed: the highest step in {served.folder / 'west'}, before checkpoint-5)",
        "format": "A",
        "layout": None,
        "rank": 4,
        "scale": 2.0,
        "reaches": {"attention": 12, "routed expert": 48},
        "missing_pairs": 0,
        "warnings": ["../moe_lora.pt looks like weights and is not read; the adapter is adapter_model.safetensors"],
    }
    assert proof["acts"] is True
    assert proof["difference"] > 0.5 > 4 * proof["noise"]
    assert 0 < proof["reference_error"] < 0.02
    for name in (None, "west"):
        require_match(served.running, reference, name)
    chat = served.running.client.post(ask, json=asked | {"max_tokens": 4})
    assert chat.status_code == 200, chat.text
    remembered = served.running.run_folder / "adapters.json"
    assert read_json(remembered)["west"] == str(served.folder / "west" / "checkpoint-20")
    assert served.running.client.post(unload, json=unloaded).status_code == 200
    assert not any("west" in model for model in served.models())
    assert "west" not in read_json(remembered)


def write_zero(folder: Path, model: Path) -> Path:
    return write_per_expert(folder, model, EXPERTS, size=0.0)


def link_out(folder: Path) -> Path:
    folder.symlink_to(OUTSIDE)
    return folder


def link_file_out(folder: Path) -> Path:
    shutil.copytree(OUTSIDE, folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(OUTSIDE / "adapter_model.safetensors")
    return folder


def write_holes(folder: Path, model: Path) -> Path:
    return write_per_expert(folder, model, EXPERTS[:-1])


SHOWN_BY_THE_PROOF = "lora_path: base and adapter give the same"
REFUSED: dict[str, Callable[[Path, Path], Path]] = {
    "lora_path: base and adapter give the same first-token logprobs (largest difference 0": write_zero,
    "lora_path: {path} has rank 9, but this server accepts ranks up to 8. Start it with lora.max_rank=9 or larger.": (
        lambda folder, model: write_per_expert(folder, model, EXPERTS, rank=9)
    ),
    "lora_path: {path} has rank 10, but this server accepts ranks up to 8.": (
        lambda folder, model: write_converted(folder, model, rank=5)
    ),
    "lora_path: {path} reaches lm_head, but this server accepts adapters only on down_proj, gate_proj, ": (
        lambda folder, model: write_per_expert(folder, model, [*EXPERTS, "lm_head"])
    ),
    "lora_path: 2 expert projections of the layers that it changes have no LoRA weights. "
    "Start the server with lora.allow_missing=true": write_holes,
    "lora_path: parts of it cannot be served: router (SGLang has no LoRA on routers). "
    "Start the server with lora.ignore=[router] to serve the rest.": (
        lambda folder, model: write_per_expert(folder, model, [*EXPERTS, ".mlp.gate"])
    ),
    "lora_path: adapter_config.json asks for something that is not supported: use_dora (DoRA).": (
        lambda folder, model: write_per_expert(folder, model, EXPERTS, use_dora=True)
    ),
    "lora_path: no folder {path}, but an adapter folder is expected.": lambda folder, model: folder,
    f"lora_path: {{path}} is {OUTSIDE}, which is in no folder that this server loads adapters from (": (
        lambda folder, model: link_out(folder)
    ),
    f"lora_path: {{path}}/adapter_model.safetensors is a link to {OUTSIDE}/adapter_model.safetensors, which is in ": (
        lambda folder, model: link_file_out(folder)
    ),
    f"lora_path: {OUTSIDE} is in no folder that this server loads adapters from (": lambda folder, model: OUTSIDE,
    "lora_path: /nowhere/at/all is in no folder that this server loads adapters from (": (
        lambda folder, model: Path("/nowhere/at/all")
    ),
    "lora_path: /proc/self/root is in no folder that this server loads adapters from (": (
        lambda folder, model: Path("/proc/self/root")
    ),
    "lora_path: it holds a NUL byte": lambda folder, model: Path("a\0b"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_is_one_line_and_leaves_the_server_as_it_was(message: str, served: Served, tmp_path: Path) -> None:
    before = served.models(), served.running.logprobs(PROMPT)
    path = REFUSED[message](tmp_path / "wrong", served.folder / "model")
    answer = served.load("wrong", path)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert answer.json()["error_message"].startswith(message.format(path=path)), answer.text
    assert "\n" not in answer.json()["error_message"]
    assert served.running.client.post("/generate", json={"text": PROMPT, "lora_path": "wrong"}).status_code >= 400
    assert (served.models(), served.running.logprobs(PROMPT)) == before
    state = served.running.client.get("/server_info").json()["internal_states"][0]["kt_launch"]
    assert len(state["slots"]) <= 1, "the adapter kept its slot"
    if (path / "adapter_config.json").is_file() and not message.startswith(SHOWN_BY_THE_PROOF):
        assert inspected(served, path)["error_message"] == answer.json()["error_message"]


def inspected(served: Served, path: Path) -> dict[str, Any]:
    """What action=inspect says about loading it into a server of the same keys."""
    plan = read_json(served.running.run_folder / "plan.json")
    modules, allowed = plan["resolved"]["lora.target_modules"]["value"], plan["config"]["lora"]["allow"]
    room = ("lora.max_rank=8", f"lora.target_modules=[{','.join(modules)}]", f"lora.allow=[{','.join(allowed)}]")
    words = ["inspect", "--json", "model=auto", f"model.path={served.folder / 'model'}"]
    out = io.StringIO()
    with redirect_stdout(out):
        main([*words, f"lora.path={path}", *room])
    loading: dict[str, Any] = json.loads(out.getvalue())[0]["loading"]
    return loading


def test_a_name_that_is_taken_is_refused(served: Served) -> None:
    served.load("taken", served.folder / "fused").raise_for_status()
    again = served.load("taken", served.folder / "attention")
    assert again.status_code == 400
    assert "lora_name: an adapter taken is already loaded. Choose another name" in again.text
    served.unload("taken")
    served.load("taken", served.folder / "attention").raise_for_status()
    served.unload("taken")


def test_a_context_beyond_what_the_model_was_made_for(served: Served) -> None:
    asked = [(7 * place) % 400 + 10 for place in range(4150)]
    body = {"input_ids": asked, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    answer = served.running.client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["meta_info"]["prompt_tokens"] == 4150


def test_more_adapters_than_stay_loaded_are_put_aside_and_read_again(served: Served, reference: Reference) -> None:
    for name in ("west", "fused", "attention"):
        served.load(name, served.folder / name).raise_for_status()
    for side in ("west", "fused", "attention", None):
        require_match(served.running, reference, side)
    os.utime(
        served.folder / "west" / "checkpoint-20" / "adapter_model.safetensors"
    )  # as if written again: proven again
    require_match(served.running, reference, "west")


def test_it_has_recorded_how_often_each_expert_was_chosen(served: Served) -> None:
    assert read_json(served.running.run_folder / "plan.json")["resolved"]["kt.num_gpu_experts"]["value"] == 0
    assert served.running.stop() == 130
    found = read_profile(served.folder / "recorded.json", 8)
    assert found.layers.keys() == {1, 2}
    counts = [sum(found.layers[layer]) for layer in (1, 2)]
    assert counts[0] == counts[1] > 0 and counts[0] % 3 == 0  # every token chooses three experts in each layer
