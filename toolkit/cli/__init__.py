"""The `bloomdesk` command: options, bars, and what is printed. The only room of the toolkit that prints."""
