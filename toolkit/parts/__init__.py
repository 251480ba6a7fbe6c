"""A prepared directory, written and read back part by part.

Words. *destination*: a directory that is being made. *region*: bytes of a file that have a hash of their own. *copied*
part: one whose tensors are stored as they were found. *coded* part: one whose matrices are stored in another form.
*comparison*: of a source's tensors with what the parts that are there were made from. *release*: deletion of a source
shard, once all parts made from it were read back. *damage*: what a check found otherwise than its record.

May import `hub`, `source` and `io`, and of the runner the kernel's decoders and encoders, and the tokenizer.
"""
