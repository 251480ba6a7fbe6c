"""Bytes in motion: one reader, one writer, one hasher, and what long work reports.

Words. *block*: up to 8 MiB of a file that are read, hashed and written at once; not a transformer's. *range*: bytes of
one file, read ahead block by block. *progress*: a file's name, its bytes so far, and its bytes in all. *work*: a verb
and its bytes, which has progress.

May import of the runner `system` and `format`.
"""
