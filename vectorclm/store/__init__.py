"""The store of immutable artifacts.

In: files and the specification that they were built from.
Out: verified files, leases, listings, clean-up.
"""
