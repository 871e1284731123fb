"""Fast forms of the decoder's layers: RMSNorm, stacked projections, rotary embeddings, SwiGLU.

Shape letters: model.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vectorclm.nn.matmul import matmul, matmul_tn, project


def use_custom_backward() -> bool:
    """Whether to use the hand-written gradients: autograd records, and no compiler fuses the operations."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products under autocast on the device of `x`; without autocast, the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps_1: Tensor) -> tuple[Tensor, Tensor]:
    """RMS normalisation [B, T, D], and the scale [B, T, 1] of each token. F.rms_norm runs more operators on a CPU."""
    norm_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
    scale_BT1 = torch.addcmul(eps_1, norm_BT1, norm_BT1, value=1 / x_BTD.shape[-1]).rsqrt_()
    return torch.mul(x_BTD, scale_BT1).mul_(weight_D), scale_BT1


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` with its gradient, in half of autograd's passes over the tensors."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps_1: Tensor) -> Tensor:
        normed_BTD, scale_BT1 = rms_norm(x_BTD, weight_D, eps_1)
        ctx.save_for_backward(x_BTD, weight_D, scale_BT1)
        return normed_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        x_BTD, weight_D, scale_BT1 = ctx.saved_tensors
        (grad_BTD,) = grads
        product_ND = (grad_BTD * x_BTD).flatten(0, -2)
        grad_weight_D = product_ND.T @ scale_BT1.flatten()
        pull_BT1 = (product_ND @ weight_D).view_as(scale_BT1) * scale_BT1.pow(3) / -x_BTD.shape[-1]
        return (grad_BTD * weight_D).mul_(scale_BT1).addcmul_(x_BTD, pull_BT1), grad_weight_D, None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467)."""

    eps_1: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.register_buffer("eps_1", torch.tensor([eps]), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.is_cuda or torch.compiler.is_compiling():
            wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, self.weight.dtype))
            return F.rms_norm(wide_BTD, self.weight.shape, self.weight, self.eps).to(x_BTD.dtype)
        if not torch.is_grad_enabled():
            return rms_norm(x_BTD, self.weight, self.eps_1)[0]
        out: Tensor = _RMSNorm.apply(x_BTD, self.weight, self.eps_1)  # type: ignore[no-untyped-call]
        return out


class Linear(nn.Linear):
    """Linear projection without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return project(x_BTD, self.weight)


class StackedLinear(Linear):
    """Several projections of one input, computed as one matrix product.

    The state dict has one weight for each projection, as Llama's state dict does.
    """

    def __init__(self, in_features: int, rows: Mapping[str, int]) -> None:
        super().__init__(in_features, sum(rows.values()))
        self.rows = dict(rows)  # number of output rows by the projection's name in Llama


def _projections(model: nn.Module) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The state dict key of each stacked weight, and the shapes of its projections by their own keys."""
    for path, module in model.named_modules():
        if isinstance(module, StackedLinear):
            parent = path.rpartition(".")[0]
            shapes = {f"{parent}.{name}.weight": (rows, module.in_features) for name, rows in module.rows.items()}
            yield f"{path}.weight", shapes


def unstack(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """State dict hook: replace each stacked weight by views of its projections."""
    for key, shapes in _projections(model):
        weights = torch.split(state_dict.pop(prefix + key), [rows for rows, _ in shapes.values()])
        state_dict.update(zip((prefix + name for name in shapes), weights, strict=True))


def stack(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *reports: Any) -> None:
    """Load hook: stack the weights of projections; report missing keys and wrong shapes as torch does."""
    _, _, missing, _, errors = reports
    for key, shapes in _projections(model):
        weights = [state_dict.pop(prefix + name, None) for name in shapes]
        for (name, shape), weight in zip(shapes.items(), weights, strict=True):
            if weight is None:
                missing.append(prefix + name)
            elif weight.shape != shape:
                errors.append(f"size mismatch for {prefix}{name}: {tuple(weight.shape)}, not {shape}")
        found = [weight for weight in weights if weight is not None]
        if [tuple(weight.shape) for weight in found] == list(shapes.values()):
            state_dict[prefix + key] = torch.cat(found)


def rotate(x_BTHE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, out: Tensor | None = None) -> Tensor:
    """Apply rotary position embeddings to queries or keys [B, T, heads, E]: rotate dimensions i and
    i + E/2 by the position's angle.

    The sines of the first half are negative, see `model.rotary_table`. The angles may have a wider dtype than `x`.
    """
    rotated = torch.addcmul(x_BTHE * cos_T1E, x_BTHE.roll(x_BTHE.shape[-1] // 2, -1), sin_T1E, out=out)
    return rotated.to(x_BTHE.dtype)


def rotary_heads(qkv_BTGE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, E], keys and values [B, T, K, E] of their joint projection [B, T, G, E]; the first two rotated.

    `heads` has the numbers of query, key and value heads. Rotary embeddings: Su et al., arXiv 2104.09864.
    """
    split: tuple[Tensor, Tensor, Tensor]
    split = (RotaryQKV.apply if use_custom_backward() else plain_rotary_heads)(qkv_BTGE, cos_T1E, sin_T1E, heads)
    return split


def plain_rotary_heads(
    qkv_BTGE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, heads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain form of `rotary_heads`, differentiated by autograd."""
    queries_and_keys, values = torch.split(qkv_BTGE, [heads[0] + heads[1], heads[2]], dim=2)
    queries, keys = torch.split(rotate(queries_and_keys, cos_T1E, sin_T1E), heads[:2], dim=2)
    return queries, keys, values


class RotaryQKV(torch.autograd.Function):
    """`plain_rotary_heads` with a gradient that is written straight into one tensor [B, T, G, E]."""

    @staticmethod
    def forward(ctx: Any, qkv_BTGE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, heads: list[int]) -> Any:
        ctx.save_for_backward(cos_T1E, sin_T1E)
        ctx.heads = heads
        queries, keys, values = torch.split(qkv_BTGE, heads, dim=2)
        return rotate(queries, cos_T1E, sin_T1E), rotate(keys, cos_T1E, sin_T1E), values.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        cos_T1E, sin_T1E = ctx.saved_tensors
        grad_q_BTHE, grad_k_BTKE, grad_v_BTKE = grads
        batch, tokens, _, head_dim = grad_q_BTHE.shape
        grad_BTGE = grad_q_BTHE.new_empty(batch, tokens, sum(ctx.heads), head_dim)
        queries, keys, values = torch.split(grad_BTGE, ctx.heads, dim=2)
        rotate(grad_q_BTHE, cos_T1E, -sin_T1E, out=queries)
        rotate(grad_k_BTKE, cos_T1E, -sin_T1E, out=keys)
        values.copy_(grad_v_BTKE)
        return grad_BTGE, None, None, None


def swiglu_projection(x_BTD: Tensor, gate_up: Linear, down: Linear) -> Tensor:
    """`down(silu(gate(x)) * up(x))` [B, T, D], the feed-forward half of a block (Shazeer, arXiv 2002.05202)."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # Two products: the compiler builds the gradient of one from its halves, and reads each twice.
        gate_BTF, up_BTF = (F.linear(x_BTD, weight) for weight in gate_up.weight.chunk(2))
        return down(F.silu(gate_BTF) * up_BTF)  # type: ignore[no-any-return]
    gate_up_BTF = gate_up(x_BTD)
    if not use_custom_backward():
        return down(swiglu(gate_up_BTF))  # type: ignore[no-any-return]
    out: Tensor = GatedProjection.apply(gate_up_BTF, down.weight.to(gate_up_BTF.dtype))  # type: ignore[no-untyped-call]
    return out


def plain_swiglu_projection(x_BTD: Tensor, gate_up: Linear, down: Linear) -> Tensor:
    """Plain reference of `swiglu_projection`, as in the paper."""
    gate_BTF, up_BTF = (F.linear(x_BTD, weight) for weight in gate_up.weight.chunk(2))
    return F.linear(F.silu(gate_BTF) * up_BTF, down.weight)


def swiglu(gate_up_BTF: Tensor) -> Tensor:
    """`silu(gate) * up` [B, T, F] of their joint projection [B, T, 2F]."""
    gate, up = gate_up_BTF.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class GatedProjection(torch.autograd.Function):
    """`swiglu(gate_up) @ weight.T`, which recomputes the gated activation in the backward pass to save memory.

    The gradients of gate and up are written straight into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, gate_up_BTF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_BTF, weight_DF)
        return matmul(swiglu(gate_up_BTF), weight_DF)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        gate_up_BTF, weight_DF = ctx.saved_tensors
        (grad_BTD,) = grads
        gate, up = gate_up_BTF.chunk(2, dim=-1)
        active = F.silu(gate)
        grad_weight_DF = matmul_tn(grad_BTD.flatten(0, -2), (active * up).flatten(0, -2))
        grad = matmul(grad_BTD, weight_DF.T)
        grad_gate_up_BTF = torch.empty_like(gate_up_BTF)
        grad_gate, grad_up = grad_gate_up_BTF.chunk(2, dim=-1)
        torch.mul(active, grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up_BTF, grad_weight_DF
