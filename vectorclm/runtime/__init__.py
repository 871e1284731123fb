"""The machine a process runs on.

In: its devices, processes and ranks.
Out: settings for torch, collectives, progress.
"""
