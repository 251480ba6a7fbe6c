"""The commands generate, plan and bench: what they print, files of prompts and of results, the status line.

The only room of the runner that prints. May import every other. The options are declared in `toolkit/cli/app.py`.
"""
