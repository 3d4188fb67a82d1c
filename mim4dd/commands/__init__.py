"""What the command lines share: options and their defaults, a run and its files, terminal, exit codes."""
