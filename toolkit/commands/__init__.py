"""One file for each verb: a plan, which writes nothing; carrying it out; and a summary.

Words. *build*: makes the missing parts of a directory; what convert, prepare and repair share. *placement*: which
directory gets which slice. *schedule*: the order of shards and parts, and the disk that it takes. *arrivals*: shards
that come in one thread while parts are made in another. *staging*: where they wait. *vouched*: known to be right by a
record of its hashes. *sample*: a random share of the bytes to check.

May import every other room of the toolkit but `cli`.
"""
