"""The Llama decoder in plain PyTorch: embedding, decoder layers, tied output projection.

`save_pretrained` writes the files of Hugging Face's Llama, which transformers loads unchanged; llama.cpp needs the GGUF
file of export/gguf.py. A kind of attention that transformers lacks has a `model_type` that transformers refuses.

Shape letters, used in names and docstrings here and in nn/:
    B  batch         T  tokens in the input       S  tokens whose keys attention reads (cache + T)
    D  hidden_size   H  query heads               K  key/value heads      G  heads of q, k and v together (H + 2K)
    E  head_dim      F  intermediate_size         V  vocab_size           P  max_position_embeddings
    N  tokens of all rows in one list             C  tokens of a chunk of that list
    I, O  inputs and outputs of any linear projection                    1  a dimension of size 1
"""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vectorclm.errors import DataError, shortened
from vectorclm.formats.files import size_of
from vectorclm.formats.json_files import read_settings
from vectorclm.formats.tensors import check_tensors, load_tensors
from vectorclm.model_config import ModelConfig, read_model_config, write_config
from vectorclm.nn.attention import AttentionMask, Documents, attention, left_padded
from vectorclm.nn.layers import (
    Linear,
    RMSNorm,
    StackedLinear,
    autocast_dtype,
    rotary_heads,
    stack,
    swiglu_projection,
    unstack,
)
from vectorclm.nn.loss import IGNORE_INDEX, chunked_cross_entropy
from vectorclm.nn.matmul import project
from vectorclm.nn.tensor_files import save_tensors

Angles = tuple[Tensor, Tensor]  # cosines and sines of the positions, each [T, 1, E] or [B, T, 1, E]


class KVCache:
    """Key/value cache: keys and values of the tokens so far, in buffers of the final length."""

    def __init__(self, config: ModelConfig, batch_size: int, length: int, like: Tensor) -> None:
        shape = (batch_size, config.num_key_value_heads, length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys_BKSE = [like.new_zeros(shape) for _ in layers]
        self.values_BKSE = [like.new_zeros(shape) for _ in layers]
        self.seen = 0

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values of new tokens; return those of all tokens so far [B, K, S, E]."""
        end = self.seen + k_BKTE.shape[2]
        self.keys_BKSE[layer][:, :, self.seen : end] = k_BKTE
        self.values_BKSE[layer][:, :, self.seen : end] = v_BKTE
        return self.keys_BKSE[layer][:, :, :end], self.values_BKSE[layer][:, :, :end]


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings: cosines and sines [P, E] of all positions (RoPE; Su et al., arXiv 2104.09864).

    The layout is Llama's: dimension i is rotated together with dimension i + E/2. The sines of the first half are
    negative, so that `nn.layers.rotate` needs no sign.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(config.head_dim // 2)
    return angles.cos(), angles.sin() * signs


class Attention(nn.Module):
    """Self-attention of one layer: projections, rotary positions, KV cache, grouped-query attention.

    Each key/value head serves a group of query heads (Ainslie et al., arXiv 2305.13245). `nn.attention.attention`
    decides which keys a query attends to.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.dropout = config.attention_dropout
        queries, keys, values = (heads * config.head_dim for heads in self.heads)
        self.qkv_proj = StackedLinear(config.hidden_size, {"q_proj": queries, "k_proj": keys, "v_proj": values})
        self.o_proj = Linear(queries, config.hidden_size)

    def forward(self, x_BTD: Tensor, angles: Angles, mask: AttentionMask, cache: KVCache | None) -> Tensor:
        batch, tokens, _ = x_BTD.shape
        qkv_BTGE = self.qkv_proj(x_BTD).view(batch, tokens, sum(self.heads), -1)
        q_BTHE, k_BTKE, v_BTKE = rotary_heads(qkv_BTGE, *angles, self.heads)
        q_BHTE, k_BKSE, v_BKSE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.append(self.layer, k_BKSE, v_BKSE)
        y_BHTE = attention(q_BHTE, k_BKSE, v_BKSE, mask, self.layer, self.dropout if self.training else 0.0)
        out: Tensor = self.o_proj(y_BHTE.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = StackedLinear(config.hidden_size, rows)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return swiglu_projection(x_BTD, self.gate_up_proj, self.down_proj)


class DecoderLayer(nn.Module):
    """Pre-norm decoder block: attention and MLP each read the normalised residual stream and add to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.hidden_dropout

    def forward(self, x_BTD: Tensor, angles: Angles, mask: AttentionMask, cache: KVCache | None) -> Tensor:
        x_BTD = x_BTD + self._drop(self.self_attn(self.input_layernorm(x_BTD), angles, mask, cache))
        return x_BTD + self._drop(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class Decoder(nn.Module):
    """Embedding, decoder blocks and final norm; `model.` in the state dict."""

    cos_PE: Tensor
    sin_PE: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = config.attention
        self.has_dropout = bool(config.attention_dropout or config.hidden_dropout)
        self.activation_checkpointing = False  # keep each layer's input alone, and compute the rest again for gradients
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos_PE, sin_PE = rotary_table(config)
        self.register_buffer("cos_PE", cos_PE, persistent=False)
        self.register_buffer("sin_PE", sin_PE, persistent=False)

    def forward(
        self,
        input_ids_BT: Tensor,
        cache: KVCache | None = None,
        position_ids_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        documents: Documents | None = None,
        key_position_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states [B, T, D] of the tokens [B, T].

        By default positions continue those in the cache. `position_ids_BT` [B, T] replaces the positions; with a cache,
        `key_position_ids_BS` [B, S] are those of the keys. `mask_BTS` [B, T, S] is true where a token may attend to a
        key, never to a later one; the rule of `config.attention` applies beside the mask. With `documents`, attention
        stays inside each document of a window; `documents` exclude the other arguments. Raises ValueError for arguments
        that exclude each other, and for position ids without a mask or, with a cache, without those of the keys.
        """
        if documents is not None and not (cache is None and position_ids_BT is None and mask_BTS is None):
            raise ValueError("documents exclude cache, position_ids_BT and mask_BTS")
        if position_ids_BT is not None and mask_BTS is None:
            raise ValueError("position_ids_BT needs mask_BTS: equal positions do not say which token is later")
        if cache is not None and position_ids_BT is not None and key_position_ids_BS is None:
            raise ValueError("position_ids_BT with a cache needs key_position_ids_BS, the positions of all keys")
        start = cache.seen if cache is not None else 0
        end = start + input_ids_BT.shape[1]
        x_BTD = self.embed_tokens(input_ids_BT)
        x_BTD = x_BTD.to(autocast_dtype(x_BTD))  # the residual stream is most of a step's memory traffic
        if documents is not None:
            position_ids_BT = documents.position_ids
        positions = slice(start, end) if position_ids_BT is None else position_ids_BT
        wide = torch.promote_types(x_BTD.dtype, torch.float32)  # half precision is too coarse for angles
        cos_T1E, sin_T1E = (table[positions].unsqueeze(-2).to(wide) for table in (self.cos_PE, self.sin_PE))
        mask_B1TS = None if mask_BTS is None else mask_BTS.unsqueeze(1)
        mask = AttentionMask(documents, mask_B1TS, position_ids_BT, key_position_ids_BS, self.attention)
        again = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for layer in self.layers:
            through = partial(layer, angles=(cos_T1E, sin_T1E), mask=mask, cache=cache)
            if again:
                x_BTD = checkpoint(through, x_BTD, use_reentrant=False, preserve_rng_state=self.has_dropout)
            else:
                x_BTD = through(x_BTD)
        if cache is not None:
            cache.seen = end
        out: Tensor = self.norm(x_BTD)
        return out


class CausalLM(nn.Module):
    """The causal language model. Its output projection is the embedding (tied), so the state dict has it once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.register_state_dict_post_hook(unstack)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(stack)  # type: ignore[no-untyped-call]
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, Attention | MLP):
            # Projections into the residual stream start smaller, by the root of their number (GPT-2, section 2.3).
            # `apply` visits children first, so the projections already have their random values.
            out = module.o_proj if isinstance(module, Attention) else module.down_proj
            with torch.no_grad():
                out.weight /= math.sqrt(2 * self.config.num_hidden_layers)

    @torch.no_grad()
    def zero_output_projections(self) -> None:
        """Set the projections into the residual stream to zero: each layer starts as the identity."""
        for layer in self.model.layers:
            layer.self_attn.o_proj.weight.zero_()  # type: ignore[operator, union-attr]
            layer.mlp.down_proj.weight.zero_()  # type: ignore[operator, union-attr]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., D], which `Decoder.forward` has normalised."""
        return project(hidden, self.model.embed_tokens.weight)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] for `input_ids` [B, T], which continue the tokens in the cache, if there is one.

        Raises ValueError where the sequence is longer than max_position_embeddings.
        """
        return self.logits(self._hidden(input_ids, cache))

    def next_logits(self, input_ids: Tensor, cache: KVCache, padding_B: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the next token after `input_ids` [B, T], which continue the tokens in the cache.

        `padding_B` is the number of padding tokens at the left of each row. Raises ValueError as `forward` does.
        """
        return self.logits(self._hidden(input_ids, cache, padding_B)[:, -1])

    def _hidden(self, input_ids: Tensor, cache: KVCache | None, padding_B: Tensor | None = None) -> Tensor:
        tokens = input_ids.shape[1] + (cache.seen if cache is not None else 0)
        if tokens > self.config.max_position_embeddings:
            raise ValueError(f"{tokens} tokens exceed max_position_embeddings ({self.config.max_position_embeddings})")
        if padding_B is None:
            hidden: Tensor = self.model(input_ids, cache)
            return hidden
        padded: Tensor = self.model(input_ids, cache, **left_padded(padding_B, input_ids.shape[1], tokens)._asdict())
        return padded

    def loss(self, input_ids: Tensor, labels: Tensor, documents: Documents | None = None) -> Tensor:
        """Summed cross-entropy (nats) of `labels` [B, T], without all logits in memory.

        As in transformers, labels are aligned with the inputs, and this method shifts them by one. IGNORE_INDEX
        carries no loss. With `documents`, attention stays inside each document of a window.
        """
        hidden_ND = self.model(input_ids, documents=documents).flatten(0, 1)
        targets_N = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # the last token has no target
        return chunked_cross_entropy(hidden_ND, self.model.embed_tokens.weight, targets_N)

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for up to `length` tokens."""
        return KVCache(self.config, batch_size, length, self.model.embed_tokens.weight)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` as transformers reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_config(self.config, directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_tensors(tensors, directory / "model.safetensors", {"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "CausalLM":
        """Load the model in a Hugging Face directory. Raises DataError for another architecture than ours."""
        directory = Path(directory)
        weights = directory / "model.safetensors"

        def no_model(message: str) -> DataError:
            return DataError(f"{directory} is not a model directory: {message}")

        raw = read_settings(directory / "config.json", "a model's configuration", no_model)
        check_tensors(weights, no_model, floats=True)
        size = size_of(weights, "a file of tensors", no_model)
        config = read_model_config(raw, str(directory / "config.json"))
        if config.parameters > size:  # checked before memory is allocated for a size that only config.json claims
            raise DataError(
                f"{weights} does not fit its config.json: {config.parameters:,} parameters in {size:,} bytes"
            )
        tensors = load_tensors(weights, no_model, floats=True)
        model = cls(config)
        tensors.pop("lm_head.weight", None)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise DataError(f"{weights} does not fit its config.json: {shortened(error)}") from error
        return model
