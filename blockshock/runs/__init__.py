"""What every command that trains shares: settings, files, ranks, checkpoints, log, schedule."""
