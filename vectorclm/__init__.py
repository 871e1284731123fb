"""VectorCLM's core: raw text to an evaluated, instruction-tuned small language model."""

import os

__version__ = "0.1.0"

# OpenMP reads this once, when torch is loaded. By default its threads spin while they wait, and two trainings that
# share the cores then slow each other tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
