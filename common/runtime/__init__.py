"""What everything else stands on: settings, how a command starts and ends, devices, ranks, seeds, whole files."""
