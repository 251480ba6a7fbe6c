"""Attacks with random kills, full disks, and damaged or made-up files, each repeatable from its seed."""
