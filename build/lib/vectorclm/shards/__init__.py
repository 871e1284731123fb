"""Tokenized windows.

In: a sample or conversations, and a tokenizer.
Out: verified shards, and an order to read them in.
"""
