"""What mergekit users bring: merges as data, with what is expected of each, and families of checkpoints."""
