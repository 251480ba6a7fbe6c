"""What should never be lost is attacked: kills, full disks, damaged files and made-up ones, at random from a seed."""
