"""The store of immutable artifacts, on a local disk or in an object store.

In: files, and the specification of the stage that built them.
Out: verified files, leases, listings, garbage collection.
"""
