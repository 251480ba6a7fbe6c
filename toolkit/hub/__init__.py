"""The network: a revision of a repository, and its files, resumed and checked.

Words. *revision*: a branch, tag or commit. *pins*: the names, sizes and hashes of bigscience/bloom's files. *partial
file*: what has come of a file, a clean prefix of it. *read timeout*: seconds without a byte. *line*: the way to the
Hub as all connections of a command share it. *outage*: nothing has come for some seconds. *patience*: how long one is
waited out. *wrong answer*: somebody else's, like a proxy's page.

May import `source` and `io`.
"""
