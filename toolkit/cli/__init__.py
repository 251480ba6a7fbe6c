"""The `bloomdesk` command: all options, progress, and what is printed. The only room of the toolkit that prints.

Words. *option*: a flag, declared once, in `options.py` if commands share it. *status line*: where long work is, on one
line of a terminal. *report*: the lines that say what a plan or a summary has.

May import everything of the toolkit, and what runs a model: `runner.cli` and the options of a generation.
"""
