"""The `bloomdesk` command: all options, progress, and what is printed. The only room of the toolkit that prints."""
