"""Plan a training on machines that are not at hand: an experiment and a cluster in, time, cost, memory and limits out.

`step` predicts a step from single kernels and links, `plan` what a training costs; `simulation` counts what each rank
reads, with the order and division of the training itself.
"""
