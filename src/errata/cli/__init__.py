"""The command line: each command parses, calls one job, and says what happened."""
