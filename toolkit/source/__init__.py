"""Checkpoints as others wrote them, read as data and never run.

Words. *source shard*: a weights file as the Hub has it. *key*: a tensor's name there. *index*: which shard has
which key.

May import `io`.
"""
