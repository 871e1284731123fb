"""Drafts of experiments: an experiment file whose settings fit one's own text, this machine and the minutes at hand.

In: files, folders, patterns, hub ids or addresses of text and of conversations.
Out: a commented TOML file for `vectorclm run`; and the speed of this machine, for estimates.
"""
