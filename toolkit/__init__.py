"""Prepares BLOOM checkpoints for the runner: download, convert, verify."""
