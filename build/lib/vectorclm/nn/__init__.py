"""Layers of the decoder.

In: tensors.
Out: attention, projections and losses. Each fast form has a plain form with the same result.
"""
