"""One file for each verb: a plan, which writes nothing; carrying it out; and a summary.

May import every other room of the toolkit but `cli`.
"""
