"""Some experts of each layer resident on the model's device, the others in kt_kernels: base and adapters on every part
are served as the merged checkpoints. Which experts are resident is what a server recorded before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from launching import launched
from served_adapters import STARTED, Logprobs, Served, write_adapters
from tiny_checkpoints import write_checkpoint

pytestmark = pytest.mark.server
RESIDENT = 3
COUNTS = {1: [1, 0, 9, 4, 0, 0, 8, 2], 2: [0, 7, 0, 7, 7, 0, 1, 1]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from kt_model.expert_profile import write_profile

    folder = tmp_path_factory.mktemp("resident")
    checkpoint = write_checkpoint("deepseek_v2", folder / "model")
    write_profile(folder / "profile.json", COUNTS)
    adapters = write_adapters(folder, checkpoint)
    started = [f"lora.adapters.{name}.path={adapters[name]}" for name in STARTED]
    residents = [f"kt.num_gpu_experts={RESIDENT}", f"kt.expert_profile={folder / 'profile.json'}"]
    residents += ["proof.whole_model=off", "proof.text=warn"]
    words = ["model=auto", f"model.path={checkpoint}", "lora=none", *started, *residents]
    with launched(*words, runs=folder / "runs") as running:
        yield Served(running, checkpoint, adapters)


def test_both_halves_are_the_merged_checkpoints(served: Served, merged_logprobs: Logprobs) -> None:
    for name in (None, *STARTED):
        served.check(name, merged_logprobs)
    for layer in served.running.layers():
        assert layer["experts"] == 8 - RESIDENT
        assert layer["adapter_tokens"] > 0


def test_adapters_come_and_go_in_both_halves(served: Served, merged_logprobs: Logprobs) -> None:
    for name in ("fused", "up"):
        assert served.load(name).status_code == 200
        served.check(name, merged_logprobs)
        served.check(None, merged_logprobs)
        served.unload(name)
    served.check("kt", merged_logprobs)
