"""What a run stands on: device, threads, processes, random draws, files that are whole or not there."""
