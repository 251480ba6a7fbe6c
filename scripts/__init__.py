"""What the project is tried with, each run from the root as `python -m scripts.ROOM.FILE`; nothing is installed."""
