"""What a model will take of this machine, and what it takes: rates, a forecast, a plan before a download, a benchmark.

Words. *rate*: measured bytes or multiply-adds a second. *limit*: the least time of a pass, streamed bytes at the
disk's rate or all weights at the memory's. *forecast*: disk, RAM and seconds from shape and rates.

May import `generation` and what it may import.
"""
