"""Files `tokenizer.json`: kinds, counts and patterns are checked before the library builds a tokenizer.

The library backtracks in regular expressions, panics on parts that contradict one another, and rewrites texts as often
as a file says. So a file has only parts of stated kinds, and regular expressions of a stated list.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectorclm.errors import DataError, shortened
from vectorclm.formats.files import read_bytes
from vectorclm.formats.json_files import parse_json
from vectorclm.formats.limits import (
    MANIFEST_VALUES,
    TOKEN_CHARACTERS,
    TOKENIZER_BYTES,
    TOKENIZER_PARTS,
    VOCABULARY,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = {  # of each part
    "normalizer": {
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "Replace"),
        *("Prepend", "ByteLevel", "Sequence"),
    },
    "pre_tokenizer": {
        *("ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation", "Digits", "Metaspace"),
        *("UnicodeScripts", "CharDelimiterSplit", "Split", "Sequence"),
    },
    "post_processor": {"ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing", "Sequence"},
    "decoder": {"ByteLevel", "BPEDecoder", "Metaspace", "Fuse", "Strip", "ByteFallback", "Replace", "Sequence"},
}
LISTS = {"normalizers", "pretokenizers", "processors", "decoders"}  # of a Sequence
GROWS = {"NFD", "NFKD", "NFKC", "NFC", "Nmt", "ByteLevel", "Prepend"}  # normalizers; each once at most
PATTERNS = {  # regular expressions whose time grows with the text alone
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    *(
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"""  # of Llama 3, and of Qwen
        rf"""{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    r"""\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+""",
    r"\s+",
    r"\p{N}",
    r"\d",
}
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def load_tokenizer_file(path: Path) -> "Tokenizer":
    """The tokenizer of a file. Raises DataError where the file is damaged or has parts that are not read."""
    from tokenizers import Tokenizer

    text = json.dumps(read_tokenizer_record(path), ensure_ascii=False)
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exception, and panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise DataError(f"{path} is not a tokenizer: {shortened(error)}") from error


def read_tokenizer_record(path: Path) -> dict[str, Any]:
    """The checked content of a `tokenizer.json`. Raises DataError naming the part that is wrong."""
    data = read_bytes(path, TOKENIZER_BYTES, "a tokenizer")
    try:
        record = parse_json(data, MANIFEST_VALUES)
        _check(record)
    except ValueError as error:
        raise DataError(f"{path} is not a tokenizer: {error}") from error
    return dict(record)


def _check(record: Any) -> None:
    """Raise ValueError with what is wrong."""
    _require(isinstance(record, dict), "it holds no table")
    _check_model(record.get("model"))
    added = [] if record.get("added_tokens") is None else record["added_tokens"]
    _require(isinstance(added, list) and len(added) <= VOCABULARY, "added_tokens is no list of tokens")
    for token in added:
        _require(isinstance(token, dict), "an added token is no table")
        _check_token(token.get("content"), "an added token")
        _require(bool(token["content"]), "an added token is empty")
        _check_id(token.get("id"), "an added token")
    vocabulary = record["model"]["vocab"]
    ids = [*vocabulary.values(), *(token["id"] for token in added if token["content"] not in vocabulary)]
    _require(len(set(ids)) == len(ids), "two tokens have the same id")
    _require(not ids or max(ids) < len(ids), f"its {len(ids):,} tokens do not have the ids 0 to {len(ids) - 1:,}")
    for name in PARTS:
        parts = list(_parts(record.get(name), name))
        for part in parts:
            _check_part(part, name)
        grown = [part["type"] for part in parts if name == "normalizer" and part["type"] in GROWS]
        _require(len(set(grown)) == len(grown), "a normalizer stands there twice")


def _parts(part: Any, name: str, depth: int = 0) -> Iterator[dict[str, Any]]:
    """A part and the parts inside it, TOKENIZER_PARTS at most."""
    if part is None:
        return
    _require(isinstance(part, dict) and isinstance(part.get("type"), str), f"{name} has no type")
    kind = part["type"]
    _require(kind in KINDS[name], f"{name} has the type {kind!r:.40}, which is not read")
    yield part
    if kind == "Sequence":
        _require(depth == 0, f"{name} has a Sequence in a Sequence")
        lists = [part[key] for key in LISTS if isinstance(part.get(key), list)]
        _require(len(lists) == 1 and len(lists[0]) <= TOKENIZER_PARTS, f"{name} is no list of {TOKENIZER_PARTS} parts")
        for inner in lists[0]:
            yield from _parts(inner, name, depth + 1)


def _check_part(part: dict[str, Any], name: str) -> None:
    kind = part["type"]
    if kind == "Replace":
        pattern: Any = part.get("pattern")
        content: Any = part.get("content")
        _require(isinstance(pattern, dict) and isinstance(pattern.get("String"), str), f"{name} replaces by a pattern")
        _require(isinstance(content, str), f"{name} replaces by no text")
        _require(bool(pattern["String"]), f"{name} replaces an empty text")
        grows = len(content.encode(errors="replace")) - len(pattern["String"].encode(errors="replace"))
        _require(grows <= 2, f"{name} replaces a text by a longer one")
    elif kind == "Strip" and name == "decoder":  # the library panics where both ends take more than a token has
        _require(part.get("start") in (0, 1) and part.get("stop") == 0, "decoder strips other than one character")
    elif kind == "Prepend":
        _check_token(part.get("prepend"), f"{name}'s prefix")
    elif kind == "Split":
        pattern = part.get("pattern") or {}
        _require(isinstance(pattern, dict) and len(pattern) == 1, f"{name} has no pattern")
        expression, text = pattern.get("Regex"), pattern.get("String")
        _require(
            expression in PATTERNS if isinstance(expression, str) else isinstance(text, str) and bool(text),
            f"{name} splits by {expression!r:.60}, which is none of the regular expressions that are read",
        )
    elif kind == "TemplateProcessing":
        for pieces in (part.get("single"), part.get("pair")):
            _require(isinstance(pieces, list) and len(pieces) <= TOKENIZER_PARTS, f"{name} has no template")


def _check_model(model: Any) -> None:
    _require(isinstance(model, dict), "it has no model")
    _require(model.get("type", "BPE") == "BPE", f"model.type is {model.get('type')!r:.40}, not 'BPE'")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    _require(isinstance(vocabulary, dict), "model.vocab is no table of tokens")
    _require(len(vocabulary) <= VOCABULARY, f"model.vocab has more than {VOCABULARY:,} tokens")
    for token, number in vocabulary.items():
        _check_token(token, "a token")
        _check_id(number, "a token")
    _require(isinstance(merges, list) and len(merges) <= VOCABULARY, f"model.merges is no list of {VOCABULARY:,}")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        _require(isinstance(pair, list) and [type(one) for one in pair] == [str, str], "a merge is no pair of texts")
        _require({*pair, "".join(pair)} <= vocabulary.keys(), "a merge joins what are no tokens")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(key), f"model.{key} is set, which is not read")
    unknown = model.get("unk_token")
    _require(unknown is None or (isinstance(unknown, str) and unknown in vocabulary), "model.unk_token is no token")


def _check_token(token: Any, what: str) -> None:
    _require(isinstance(token, str) and len(token) <= TOKEN_CHARACTERS, f"{what} is no text of {TOKEN_CHARACTERS:,}")
    try:
        token.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} has half a surrogate") from None


def _check_id(number: Any, what: str) -> None:
    _require(type(number) is int and 0 <= number < 2 * VOCABULARY, f"{what} has the id {number!r:.40}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
