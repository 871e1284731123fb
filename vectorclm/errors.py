"""What can go wrong, told to the person who must act.

VectorCLMError
├── ConfigError      the experiment asks for something impossible: edit it, a retry cannot help
├── DataError        a source, a document or a model directory is not what it should be
├── StoreError       the store cannot be reached or written: a retry may help
│   └── CorruptArtifactError   bytes in the store differ from their manifest
│       └── CorruptBlockError  those of one block of a shard, and stayed so when it was read again
├── InUseError       another process is building the same artifact
├── OutOfMemoryError the tensors do not fit: lower micro_batch_size, a retry at the same size cannot help
├── PreemptedError   SIGTERM ended a training, which has kept a checkpoint: run the same again
├── ReproducibilityError   what was made again is not the same: compare the versions and machines, a retry cannot help
└── DivergedError    the loss left the finite numbers: change the settings, a retry cannot help
"""


class VectorCLMError(Exception):
    """Base of every error this package raises on purpose; its message says what to do."""


class ConfigError(VectorCLMError):
    """A setting is unknown, impossible, or contradicts another."""


class DataError(VectorCLMError):
    """A source, a document or a model directory is missing or malformed."""


class StoreError(VectorCLMError):
    """The store cannot be read or written."""


class CorruptArtifactError(StoreError):
    """The bytes of an artifact differ from what its manifest promises."""


class CorruptBlockError(CorruptArtifactError):
    """The bytes of one block of a shard differ from what the manifest promises, each time they are read."""


class InUseError(VectorCLMError):
    """Another live process holds the lease on this artifact."""


class OutOfMemoryError(VectorCLMError):
    """The device's memory, or the machine's, does not hold what a step needs."""


class PreemptedError(VectorCLMError):
    """A training was asked to end by SIGTERM; it goes on from its checkpoint where the same is run again."""


class ReproducibilityError(VectorCLMError):
    """A stage made again, with equal settings and inputs, came out otherwise."""


class DivergedError(VectorCLMError):
    """The loss is no longer finite."""
