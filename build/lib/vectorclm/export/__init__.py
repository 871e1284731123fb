"""Models for other programs.

In: a finished model.
Out: a Hugging Face directory with its card, or a GGUF file.
"""
