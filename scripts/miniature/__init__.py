"""The trained miniature of 70 blocks: its texts, its training, and how its answers are judged."""
