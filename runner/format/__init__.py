"""The contract between toolkit and runner: what a prepared directory holds; uses the standard library only.

Words. *part*: one file of a prepared directory. *block*: one transformer block. *form*: how matrices are stored:
plain, lossless, int8 or int4. *slice*: a range of rows of every matrix, on one disk or one machine. *row group*: 12
rows of a matrix that are coded together. *panel*: up to 4,096 columns of a row group. *manifest*: what a directory was
made from, and the size and hashes of each file. *companion*: a small file copied unchanged from the source.

Imports nothing of the project but `runner.errors`.
"""
