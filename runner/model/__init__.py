"""BLOOM: functions on tensors, the KV cache, the tokenizer, and one pass over segments of many sequences.

Words. *pass*: one trip through all parts. *row*: one token position in a pass. *segment*: the rows of one sequence in a
pass. *attention metadata*: which rows and positions one segment's attention covers. *prefix*: the cache of a
sequence's first positions, which others may have as well.

May import `weights` and what it may import.
"""
