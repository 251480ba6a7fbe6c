"""A prepared directory, written and read back part by part.

May import `source` and `io`, and of the runner the kernel's decoder and encoder.
"""
