"""From files to the kernel: which weights stay in RAM, which are read ahead, and the product with a matrix.

Words. *chunk*: rows of one matrix, at most 32 MB; what is read, kept and multiplied at a time. *resident*: kept in RAM
between passes. *streamed*: read from disk in every pass. *buffer*: memory for one chunk. *ring*: the buffers that
streamed chunks of one disk share.

May import `kernel`, `format` and `system`.
"""
