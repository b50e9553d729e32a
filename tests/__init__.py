"""The tests of genpolicy; a package,
because some distributions install a top-level `tests` of their own.
"""
