"""Engines that start a training on several nodes: Slurm's srun, and Ray where there is no scheduler.

In: the command of a stage, and the runtime settings `engine`, `nodes` and `processes`.
Out: one torchrun on each node; its lines of progress, log and errors, and the exit code of the first failed rank.
"""
