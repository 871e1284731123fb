"""Training text: reading sources, filtering, deduplication, decontamination and sampling.

In: files, hub data sets or a generated world.
Out: a filtered, deduplicated, decontaminated sample.
"""
