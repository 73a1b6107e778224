"""Qwen2-MoE's shared expert is weighed without a GPU as SGLang's kernel weighs it with one."""

from __future__ import annotations

import pytest
import torch

from kt_sglang.without_gpu import torchvision_shim
from kt_sglang.without_gpu.shared_expert_gate import around_fused_gate_sigmoid_mul_add

torchvision_shim.install_if_needed()


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x (T, H), gate (H), shared (T, H), out (T, H)."""
    rng = torch.Generator().manual_seed(0)
    x, gate, shared, out = (
        torch.randn(*shape, generator=rng).to(dtype) for shape in ((5, 96), (96,), (5, 96), (5, 96))
    )
    return x, gate / 10, shared, out


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU SGLang's own kernel runs")
def test_stock_sglang_still_stops_there() -> None:
    from sglang.kernels.ops.elementwise.elementwise import fused_gate_sigmoid_mul_add

    original = getattr(fused_gate_sigmoid_mul_add, "__wrapped__", fused_gate_sigmoid_mul_add)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        original(*inputs(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_added_in_place_and_rounded_once(dtype: torch.dtype) -> None:
    x, gate, shared, out = inputs(dtype)
    weight = torch.sigmoid((x.double() * gate.double()).sum(-1, keepdim=True))
    expected = out.double() + weight * shared.double()
    before = x.clone(), gate.clone(), shared.clone()
    around_fused_gate_sigmoid_mul_add(lambda: None, x, gate, shared, out)
    # Half a step of the output's type, and float32's own noise.
    bound = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert bool(((out.double() - expected).abs() <= bound).all())
    assert all(torch.equal(one, then) for one, then in zip((x, gate, shared), before, strict=True))
