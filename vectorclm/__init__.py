"""VectorCLM's core: raw text to an evaluated, instruction-tuned small language model."""

__version__ = "0.1.0"
