"""Several machines: each has a slice of every matrix and its heads' KV cache, and all make one pass together.

Words. *rank*: a process, numbered by the slice that it has, from 0. *lead*: rank 0, which has the prompts, the batch
and the text. *follow*: the others, which make the passes that they are told. *order*: what the lead tells the others.
*gather*: each rank's outputs, copied to all. *card*: what a rank says of itself before they begin. *farewell*: why a
rank ended, left where the others find it. *patience*: how long one rank waits for another.

torch.distributed with gloo connects them. May import `generation` and what it may import; only `cli` imports it.
"""
