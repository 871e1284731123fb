"""Text from a model.

In: a model directory and prompts.
Out: generated text, a chat, an OpenAI-compatible server.
"""
