"""Draft tokens: where they come from, how many, and at what cost. A pass verifies them; none changes the output.

Words. *draft tokens*: tokens that a pass carries before they are known to be right. *verify*: compare them with what
the model says. *n-gram*: the last tokens, found earlier in the text (prompt lookup). *draft model*: a small BLOOM that
proposes. *acceptance rate*: the share of draft tokens that were right. *cost model*: seconds of a pass by its rows.
"""
