"""How long a step of the layers takes where no GPU can be timed: least times, and the host's."""
