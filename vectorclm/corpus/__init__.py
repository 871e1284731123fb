"""Text from its sources.

In: files, hub data sets or a generated world.
Out: a filtered, deduplicated, decontaminated sample.
"""
