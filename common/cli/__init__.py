"""The command line: settings from files and flags, and how a command starts and ends."""
