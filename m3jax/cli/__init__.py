"""The command line: commands, options and what they show; no logic."""
