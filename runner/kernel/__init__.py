"""All machine code, and its face: matrix product, operations between products, decoders and encoders, threads.

kernel.c computes. It is compiled for each kind of processor when bloomdesk is installed, and library.py loads what
suits this one.

Words. *lane*: one of the 8 partial sums of an output. *panel*: the block of weights that a core decodes into its cache
and uses at once. *task*: a function that all threads share. *epoch*: the word that opens and closes tasks.
*worker*: a thread that enters them.

May import `format` and `system`.
"""
