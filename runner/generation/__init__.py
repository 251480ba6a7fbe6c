"""From prompts to tokens: the public `Model`, the sequences that share a pass, the memory plan, draft tokens.

Words. *sequence*: a prompt and the tokens that follow. *batch*: the sequences that share a pass. *memory plan*: how the
RAM is divided. *capacity*: how many sequences and rows the memory plan has room for. *committed*: positions of a cache
that no later token changes. *shared prefix*: tokens that several texts begin with, computed once for all of them.
*constraint*: the JSON schema, regular expression or Lark grammar that says which outputs are valid. *grammar*: a
compiled constraint. *forced tokens*: those that must follow by it, whatever the logits are; they are appended at once,
and the next pass carries their rows.

May import `model` and what it may import.
"""
