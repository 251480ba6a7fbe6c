"""The commands generate, score, serve, plan and bench: what they print, files of prompts and results, the status line.

Words. *prompt*: a text of the command line, or a line of a file, with its number and perhaps an id. *result*: one line
of JSON for each text that is done, synced before the next. *note*: a line for whoever sits at a terminal. *report*:
rows that are printed as aligned lines or as one JSON object. *guard*: has an exit status for whatever happens.

The only room of the runner that prints. May import every other but `integrations`. `toolkit/cli/running.py` declares
the options, and `python -m runner` the few that it has.
"""
