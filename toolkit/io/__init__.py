"""Bytes in motion: one reader, one writer, one hasher, and what long work reports.

May import of the runner `system` and `format`.
"""
