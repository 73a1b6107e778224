"""What a CPU device does not have of experts that come to a card: registered memory, streams, and Triton's and torch's
own products. Runs where there is a card."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from streamed_layer import EPS, FORMATS, batch, case, close

from kt_model.methods import method_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "base"])
@pytest.mark.parametrize("method", FORMATS)
def test_a_layer_gives_on_a_card_what_kt_kernels_and_float32_give(method: str, adapted: bool) -> None:
    from kt_sglang.prompts.streamed import Streamer, register

    layer = case(method, 256, 192, experts=9, nodes=2)
    source, device = layer.source(adapters=adapted), torch.device("cuda")
    torch.zeros(1, device=device)  # the driver's context of this thread
    for packed in source.packed:
        register(packed, read_only=True)
    x, ids, scores, slots = batch(50, 256, 9)
    chosen = slots if adapted else None
    streamer = Streamer(source, 2, 2, device)
    there = [None if each is None else each.to(device) for each in (x, ids, scores, chosen)]
    for _ in range(3):
        out = streamer.run(source, *there).cpu()
        close(out, layer.in_float32(x, ids, scores, chosen), 2 * EPS)
        close(out, layer.on_cpu(x, ids, scores, chosen), 2 * EPS + method_of(method).reference_limit)


def test_a_mapped_file_can_be_registered_and_is_what_the_card_reads(tmp_path: Path) -> None:
    from kt_sglang.prompts.streamed import register

    wanted = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8)
    file = tmp_path / "packed"
    file.write_bytes(wanted.numpy().tobytes())
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    mapped = torch.frombuffer(pages, dtype=torch.uint8)
    register(mapped, read_only=True)
    register(mapped, read_only=True)
    assert torch.equal(mapped.to("cuda", non_blocking=True).cpu(), wanted)
    assert torch.ones(1, device="cuda").item() == 1, "what the driver refused is not found again"


def test_pages_of_pools_that_are_written_later_are_those_that_the_card_reads() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from kt_sglang.adapters.lora import _ExpertPoolsOnHost
    from kt_sglang.prompts.streamed import register

    with _ExpertPoolsOnHost():
        pool = torch.zeros((2, 4, 64, 128), dtype=torch.bfloat16, device="cuda")
    register(pool, read_only=False)
    pool[1, 2] = 3
    assert torch.equal(pool[1].to("cuda", non_blocking=True).cpu(), pool[1]) and float(pool.sum()) == 3 * 64 * 128
