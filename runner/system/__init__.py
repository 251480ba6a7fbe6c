"""What differs between operating systems: direct reads, cache advice, atomic replace, memory, locks, clutter.

Words. *page*: 4,096 bytes, the alignment of reads past the page cache. *lock*: one writer at a time, released with the
process. *atomic write*: the file is whole or absent, whatever happens. *clutter*: what systems put into directories.

Imports nothing of the project but `runner.errors`.
"""
