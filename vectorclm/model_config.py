"""The decoder's configuration: the model's shape, and its `config.json` in Hugging Face's format for Llama."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from vectorclm.errors import DataError
from vectorclm.formats.limits import ROTARY_ENTRIES
from vectorclm.nn.attention_kinds import ATTENTION_KINDS, AttentionConfig, AttentionKind
from vectorclm.settings import Settings, validate
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID


class ModelConfig(Settings):
    """The decoder's shape, with the names of Hugging Face's LlamaConfig."""

    vocab_size: int = Field(ge=300, description="Rows of the embedding; must equal tokenizer.vocab_size")
    hidden_size: int = Field(gt=0, description="Width of the residual stream")
    intermediate_size: int = Field(gt=0, description="Width of SwiGLU")
    num_hidden_layers: int = Field(gt=0, le=512, description="Decoder layers; llama.cpp knows 512")
    num_attention_heads: int = Field(
        gt=0, description="Query heads; a multiple of num_key_value_heads, and a divisor of hidden_size"
    )
    num_key_value_heads: int = Field(gt=0, description="Key/value heads; each is shared by a group of query heads")
    head_dim: int = Field(gt=0, description="Width of a head; even")
    max_position_embeddings: int = Field(gt=0, le=2**20, description="The longest sequence, in tokens")
    rope_theta: float = Field(default=10_000.0, ge=1, le=1e12, description="Base of the rotary frequencies")
    rms_norm_eps: float = Field(default=1e-5, ge=1e-30, le=1, description="Added to the mean square in RMSNorm")
    initializer_range: float = Field(default=0.02, gt=0, le=1, description="Standard deviation of the initial weights")
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on attention weights")
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the output of attention and MLP")
    attention: AttentionConfig = Field(
        default=AttentionConfig(),
        exclude_if=lambda value: value == AttentionConfig(),
        description="The keys that a token attends to",
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): transformers opens no other model"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings rotate pairs of dimensions")
        spec = ATTENTION_KINDS.get(self.attention.kind)
        if spec and (unused := self.attention.model_dump().keys() - {"kind", *spec.config_keys}):
            raise ValueError(
                f"attention.{', attention.'.join(sorted(unused))}: {self.attention.kind} attention has no such setting"
            )
        return self

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, with the tied embedding counted once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * block + self.hidden_size

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token: 6 per parameter, plus those of causal attention over a whole window.

        The estimate of PaLM (arXiv 2204.02311, appendix B) with half of its attention, because a token attends to half
        of the window on average. The figure is an upper bound where tokens attend to fewer keys: with documents apart,
        or with a kind of attention that hides keys. The dense mask of such a kind computes more than it counts: the
        products of whole windows.
        """
        attention = 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * sequence_length
        return 6.0 * self.parameters + attention


def write_config(config: ModelConfig, directory: Path) -> None:
    """Write `config.json` in the format of transformers."""
    (directory / "config.json").write_text(json.dumps(hugging_face_config(config), indent=2) + "\n")


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` for transformers: LlamaForCausalLM, or the class of another kind of attention."""
    spec = ATTENTION_KINDS[config.attention.kind]
    return {
        "architectures": [spec.architecture],
        "model_type": spec.model_type,
        **config.model_dump(exclude={"attention"}),
        **{key: getattr(config.attention, name) for name, key in spec.config_keys.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "use_cache": True,
    }


def read_model_config(raw: Any, where: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face `config.json`. Raises DataError where the file has another architecture."""
    kinds: dict[Any, AttentionKind] = {spec.model_type: kind for kind, spec in ATTENTION_KINDS.items()}
    if not isinstance(raw, dict):
        raise DataError(f"{where} is not the configuration of a model: it holds no table of settings")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in kinds:
        raise DataError(f"{where}: model_type is {model_type!r}, and the supported types are: {', '.join(kinds)}")
    if raw.get("tie_word_embeddings") is not True:
        raise DataError(f"{where}: only models with tied embeddings (tie_word_embeddings = true) are supported")
    kind = kinds[model_type]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DataError(f"{where}: rope_parameters or rope_scaling is {rope!r:.60}, not a table of settings")
    ours = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    other = [f"{key} = {raw[key]!r}" for key, value in ours.items() if raw.get(key, value) != value]
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        other.append(f"scaled positions ({scaling})")
    if other:
        raise DataError(f"{where}: unsupported settings: {', '.join(other)}")
    known = {name: raw[name] for name in ModelConfig.model_fields if name in raw}
    settings = {name: raw[key] for name, key in ATTENTION_KINDS[kind].config_keys.items() if key in raw}
    known["attention"] = {"kind": kind, **settings}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    config = validate(ModelConfig, known, where)
    if (entries := config.max_position_embeddings * config.head_dim) > ROTARY_ENTRIES:
        raise DataError(
            f"{where}: {config.max_position_embeddings:,} positions of heads of {config.head_dim:,} need a table of "
            f"{entries:,} rotary positions, {ROTARY_ENTRIES:,} at most"
        )
    return config
