"""Layers of the decoder.

In: tensors.
Out: attention, projections and losses, each with a plain form of the same meaning.
"""
