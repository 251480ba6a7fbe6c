"""The commands generate, plan and bench: options, what they print, files of prompts and results.

The only room of the runner that prints. May import every other.
"""
