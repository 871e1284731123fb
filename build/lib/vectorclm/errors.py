"""The errors of VectorCLM; each message tells the person who must act what to do.

VectorCLMError
├── ConfigError      a setting is unknown, impossible or contradictory: edit it, a retry cannot help
├── DataError        a source, a document or a model directory is missing or malformed
├── StoreError       the store cannot be reached or written: a retry may help
│   └── CorruptArtifactError   bytes in the store differ from their manifest
│       └── CorruptBlockError  bytes of one block of a shard differ, also when read again
├── InUseError       another live process is building the same artifact
├── OutOfMemoryError the tensors do not fit: lower micro_batch_size, a retry at the same size cannot help
├── PreemptedError   SIGTERM ended a training after a checkpoint: run the same command again
├── ReproducibilityError   a rebuilt artifact differs: compare versions and machines, a retry cannot help
└── DivergedError    the loss is not finite: change the settings, a retry cannot help
"""


class VectorCLMError(Exception):
    """Base class of every error that this package raises on purpose; the message says what to do."""


class ConfigError(VectorCLMError):
    """A setting is unknown, impossible, or contradicts another."""


class DataError(VectorCLMError):
    """A source, a document or a model directory is missing or malformed."""


class StoreError(VectorCLMError):
    """The store cannot be read or written."""


class CorruptArtifactError(StoreError):
    """The bytes of an artifact differ from its manifest."""


class CorruptBlockError(CorruptArtifactError):
    """The bytes of one block of a shard differ from the manifest each time they are read."""


class InUseError(VectorCLMError):
    """Another live process holds the lease on this artifact."""


class OutOfMemoryError(VectorCLMError):
    """A step needs more memory than the device or the machine has."""


class PreemptedError(VectorCLMError):
    """SIGTERM ended a training; the same command resumes from the checkpoint."""


class ReproducibilityError(VectorCLMError):
    """A stage that was built again, with equal settings and inputs, produced other bytes."""


class DivergedError(VectorCLMError):
    """The loss is no longer finite."""
