"""What to expect of a machine, and what it does: its rates, a forecast, a plan before a download, a benchmark.

Words. *rate*: bytes or multiply-adds a second that were measured. *limit*: the least time that a pass can take,
streamed bytes at the disk's rate or all weights at the memory's. *forecast*: what a model will take of a machine.

May import `generation` and what it may import.
"""
