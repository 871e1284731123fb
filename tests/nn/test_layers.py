"""Layers, products and attention with gradients of their own: values and gradients are the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_model import CONFIG
from vectorclm.model import CausalLM, rotary_table
from vectorclm.nn import matmul
from vectorclm.nn.attention import QUERY_BLOCK, causal_attention
from vectorclm.nn.layers import (
    GatedProjection,
    Linear,
    RMSNorm,
    RotaryQKV,
    StackedLinear,
    plain_rotary_heads,
    plain_swiglu_projection,
    rotary_heads,
    swiglu_projection,
)

GENERATOR = torch.Generator().manual_seed(4)


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).requires_grad_()


def test_the_norm_and_its_gradients_are_torchs() -> None:
    norm = RMSNorm(24, 1e-5).double()
    x, weight = doubles(2, 5, 24), norm.weight
    ours = torch.autograd.grad((norm(x) ** 3).sum(), [x, weight])
    theirs = torch.autograd.grad((F.rms_norm(x, (24,), weight, 1e-5) ** 3).sum(), [x, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-10  # eps is a float32


def test_gradients_of_fused_operations_are_those_of_finite_differences() -> None:
    cos, sin = (table[:5, None].double() for table in rotary_table(CONFIG))
    assert torch.autograd.gradcheck(GatedProjection.apply, (doubles(2, 3, 8), doubles(5, 4)))
    assert torch.autograd.gradcheck(lambda x: RotaryQKV.apply(x, cos, sin, (6, 2, 2)), doubles(2, 5, 10, 16))


def same(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and gradients of both are equal."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    slopes = torch.randn(ours.shape, dtype=ours.dtype, generator=GENERATOR)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, slopes), torch.autograd.grad(theirs, inputs, slopes), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_layers_with_gradients_of_their_own_are_the_plain_ones() -> None:
    cos, sin = (table[:5, None].double() for table in rotary_table(CONFIG))
    x = doubles(2, 5, 10, 16)
    ours, theirs = (torch.cat(split(x, cos, sin, [6, 2, 2]), dim=2) for split in (rotary_heads, plain_rotary_heads))
    same(ours, theirs, [x])
    gate_up, down = StackedLinear(12, {"gate_proj": 20, "up_proj": 20}).double(), Linear(20, 12).double()
    x, weights = doubles(2, 5, 12), [gate_up.weight, down.weight]
    same(swiglu_projection(x, gate_up, down), plain_swiglu_projection(x, gate_up, down), [x, *weights])
    with torch.no_grad():
        torch.testing.assert_close(swiglu_projection(x, gate_up, down), plain_swiglu_projection(x, gate_up, down))


def test_a_state_dict_of_other_projections_is_refused_by_name() -> None:
    model = CausalLM(CONFIG)
    weights = model.state_dict()
    lost = {name: weight for name, weight in weights.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.* \"model\.layers\.1\.self_attn\.k_proj\.weight\""):
        model.load_state_dict(lost)
    swapped = dict(weights)  # as many rows in all
    swapped["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.k_proj.weight"]
    swapped["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.self_attn\.q_proj\.weight"):
        model.load_state_dict(swapped)


@pytest.mark.parametrize("onednn", [False, True])
def test_products_and_their_gradients_are_torchs_by_either_library(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: onednn)
    weight = torch.randn(40, 24, generator=GENERATOR).requires_grad_()
    for rows in (1, 3, 8, 33, 100):  # each is multiplied in a way of its own
        x = torch.randn(2, rows, 24, generator=GENERATOR)[:, ::2].requires_grad_()  # with gaps
        expected = x.double() @ weight.double().T
        with torch.no_grad():
            torch.testing.assert_close(matmul.matmul(x, weight), expected.float(), rtol=0, atol=1e-4)
            one = matmul.matmul(x[:, -1], weight)
            torch.testing.assert_close(one, expected[:, -1].float(), rtol=0, atol=1e-4)
        slopes = torch.randn(expected.shape, generator=GENERATOR)
        theirs = torch.autograd.grad(expected, [x, weight], slopes.double())
        for mine, other in zip(
            torch.autograd.grad(matmul.project(x, weight), [x, weight], slopes), theirs, strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_attention_in_blocks_is_that_of_one_call() -> None:
    q, k, v = (
        doubles(2, 4, 2 * QUERY_BLOCK + 9, 8),
        doubles(2, 2, 2 * QUERY_BLOCK + 9, 8),
        doubles(2, 2, 2 * QUERY_BLOCK + 9, 8),
    )
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    parts = causal_attention(q, k, v, 0.0)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    slopes = torch.randn_like(whole)
    for ours, theirs in zip(*(torch.autograd.grad(y, [q, k, v], slopes) for y in (parts, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
