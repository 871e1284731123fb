"""Disturbs a small experiment on purpose: a store in, a table of disturbances and what each cost out.

Each trial builds one stage in a process of its own, disturbs it at a seeded random moment, repeats the same command as
a user would, and compares the artifact with that of an undisturbed run, byte by byte.
"""
