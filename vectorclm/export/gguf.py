"""Export a model as one GGUF file for llama.cpp and the programs built on it."""

from contextlib import suppress
from filecmp import cmp
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Encoding
from numpy.typing import NDArray
from torch import Tensor

from vectorclm.errors import ConfigError, DataError
from vectorclm.formats.json_files import read_table
from vectorclm.formats.templates import read_template
from vectorclm.formats.tokenizer_files import read_tokenizer_record
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.nn.attention_kinds import ATTENTION_KINDS
from vectorclm.store.durable import move_file, sync_folder, temporary_beside
from vectorclm.store.model_ref import Model
from vectorclm.tokenizer import (
    BOS_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    IM_END_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    TRANSFORMERS_TEMPLATE,
    load_tokenizer,
)

GgufType = Literal["f32", "f16", "q8_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
ARCHITECTURE = "llama"  # llama.cpp's name; it computes causal attention, whatever config.json says
# llama.cpp splits a text by the regular expression it has under this name: GPT-2's, as our tokenizer does.
PRE_TOKENIZER = "gpt-2"
# Settings of a BPE in tokenizer.json that ours does not use, and llama.cpp does not know.
UNUSED = ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def export_gguf(found: Model, kind: GgufType, out: Path | None = None) -> Path:
    """Write the model as a GGUF file to `out`, atomically, and return the file's path.

    Matrices are stored as `kind`, norms in fp32; q8_0 is blocks of 32 whole numbers with one fp16 scale, so a matrix
    whose rows do not divide into such blocks stays fp16. Equal models give equal bytes. Without `out`, the file gets
    the name that GGUF's naming convention gives it, in the current folder; its version is the beginning of the hash of
    the model's content. Raises DataError for a model that llama.cpp would read differently, and ConfigError where the
    file cannot be written, or is there already with other content.
    """
    folder = found.local()
    model = CausalLM.from_pretrained(folder)
    attention = model.config.attention.kind
    if not ATTENTION_KINDS[attention].is_causal:
        raise DataError(
            f"{folder}: the model has {attention} attention, and llama.cpp would compute causal attention: use the "
            "model without a GGUF file"
        )
    size, tuned = gguf.size_label(model.config.parameters, 0, 0, 0), "chat" if found.chat else "base"
    path = out or Path(gguf.naming_convention(None, "vectorclm", tuned, found.content[:8], size, kind) + ".gguf")
    part = temporary_beside(path)
    writer = gguf.GGUFWriter(part, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"vectorclm {size} {tuned}")
    writer.add_basename("vectorclm")
    writer.add_finetune(tuned)
    writer.add_size_label(size)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, folder, model.config.vocab_size, chat=found.chat)
    _add_weights(writer, model, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if path.exists() and not (path.is_file() and cmp(part, path, shallow=False)):
            raise ConfigError(
                f"{path} is there already, with other content: remove it, or name another file with --out"
            )
        move_file(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}: name another file with --out") from error
    finally:
        writer.close()
        with suppress(OSError):  # the error of a failing disk is the one that came first
            part.unlink(missing_ok=True)
    return path


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, *, chat: bool) -> None:
    vocabulary = load_tokenizer(folder).get_vocab()
    where = folder / "tokenizer.json"
    raw = read_tokenizer_record(where)
    if other := _differences(raw):
        raise DataError(f"{where}: llama.cpp would split texts differently from this tokenizer: {', '.join(other)}")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(vocab_size)):
        raise DataError(
            f"{where} must have the ids 0 to {vocab_size - 1:,}, each once, as the model's config.json says"
        )
    special = set(SPECIAL_TOKENS)
    merges = raw["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(IM_END_ID if chat else EOS_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if chat and (template := _chat_template(folder)):
        writer.add_chat_template(template)


def _differences(raw: dict[str, Any]) -> list[str]:
    """The settings in a `tokenizer.json` that are not byte-level BPE with GPT-2's pattern and our special tokens."""
    model, split = raw["model"], raw.get("pre_tokenizer") or {}
    wanted = [
        ("model.type", model.get("type"), "BPE"),
        ("normalizer", raw.get("normalizer"), None),
        ("pre_tokenizer.type", split.get("type"), "ByteLevel"),
        ("pre_tokenizer.add_prefix_space", split.get("add_prefix_space"), False),
        ("pre_tokenizer.use_regex", split.get("use_regex", True), True),
        ("added_tokens", [token["content"] for token in raw.get("added_tokens", [])], list(SPECIAL_TOKENS)),
        *((f"model.{key}", model.get(key) or None, None) for key in UNUSED),
    ]
    return [f"{name} is {found!r}, not {value!r}" for name, found, value in wanted if found != value]


def _chat_template(folder: Path) -> str | None:
    """The model's chat template; transformers saves it as a file of its own.

    Our own has no marks of the assistant's tokens in the file: llama.cpp and Ollama know it by its likeness to ChatML.
    """
    own = folder / "chat_template.jinja"
    if own.is_file():
        template: Any = read_template(own)
    else:
        template = read_table(folder / "tokenizer_config.json").get("chat_template")
    if template == TRANSFORMERS_TEMPLATE:
        return CHAT_TEMPLATE
    return template if isinstance(template, str) else None


def _add_weights(writer: gguf.GGUFWriter, model: CausalLM, kind: GgufType) -> None:
    """Write the tensors. The embedding is also the output matrix, which llama.cpp reuses where a file has none."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key.endswith("q_proj.weight"):
            tensor = interleaved(tensor, config.num_attention_heads)
        elif key.endswith("k_proj.weight"):
            tensor = interleaved(tensor, config.num_key_value_heads)
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        data, encoding = encoded(tensor.float().numpy(), kind)
        if not np.isfinite(gguf.dequantize(data, encoding)).all():
            advice = "it diverged in training" if kind == "f32" else "export it as f32"
            raise DataError(f"{key} has weights that {encoding.name.lower()} cannot hold: {advice}")
        writer.add_tensor(name, data, raw_dtype=encoding)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads * E, D] in the order of llama.cpp's Llama.

    llama.cpp rotates dimension 2i with 2i + 1 (as in Su et al., arXiv 2104.09864), our model i with i + E/2.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def encoded(weight: NDArray[np.float32], kind: GgufType) -> tuple[NDArray[Any], Encoding]:
    """The bytes of a tensor in a file of this kind."""
    encoding = Encoding.F32 if weight.ndim == 1 else Encoding[kind.upper()]
    if encoding == Encoding.Q8_0 and weight.shape[-1] % gguf.GGML_QUANT_SIZES[encoding][0]:
        encoding = Encoding.F16
    with np.errstate(over="ignore"):
        return gguf.quants.quantize(weight, encoding), encoding
