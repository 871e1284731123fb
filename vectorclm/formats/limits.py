"""The limits of foreign files: what a loader refuses before it allocates. The page of the package has the reasons."""

MIB = 2**20

# JSON and TOML
SETTINGS_BYTES = 16 * MIB  # of an experiment, a suite, a lock file, config.json, tokenizer_config.json
SETTINGS_VALUES = 2**20  # numbers, texts, lists and tables in such a file
MANIFEST_BYTES = 256 * MIB  # 10^5 shards with a few files each
MANIFEST_VALUES = 2**23
LINE_BYTES = 2**26  # characters of a line of JSON Lines, or of a file that is one JSON array
LINE_VALUES = 2**22
DEPTH, LINE_DEPTH = 200, 500  # lists and tables inside one another, in files and in lines of JSON
KEY_PARTS = 100  # of a dotted key of TOML

# Compressed files
XZ_MEMORY = 128 * MIB  # that a decoder may take, as a zstd window

# Parquet
PARQUET_FOOTER = 64 * MIB
PARQUET_COLUMNS = 10_000
PARQUET_ROW_GROUPS = 100_000
PAGE_BYTES = 2**28 + MIB  # of a page in memory: the longest text, in UTF-8
BATCH_BYTES = 64 * MIB  # that a batch may have if all its rows hold the largest value of a dictionary
TABLE_BYTES = 2**30  # of a small table that is read as a whole: items, texts, curves

# Tensors
TENSOR_HEADER = 16 * MIB
TENSOR_VALUES = 2**22
TENSORS = 50_000  # 512 layers have 4,600 weights, and AdamW three entries for each
DIMENSIONS = 8
ROTARY_ENTRIES = 2**28  # positions times the width of a head; 4 bytes each, twice

# Tokenizers and templates
TOKENIZER_BYTES = 64 * MIB
VOCABULARY = 2**20
TOKEN_CHARACTERS = 1_000
TOKENIZER_PARTS = 16  # normalizers, pre-tokenizers, decoders or post-processors
TEMPLATE_CHARACTERS = 64 * 1024
TEMPLATE_SECONDS = 2  # of processor time
TEMPLATE_MEMORY = 512 * MIB
TEMPLATE_OUTPUT = 4 * MIB  # characters beyond those of the messages

# GGUF
GGUF_FIELDS = 10_000
GGUF_TENSORS = 50_000
GGUF_ARRAY = 2**21  # entries: vocabularies and merges
GGUF_TEXT = 4 * MIB

# Manifests
CHAIN = 100  # artifacts between a model and its sources
TREE = 10_000  # artifacts of a chain, in which a shared input stands under each artifact
