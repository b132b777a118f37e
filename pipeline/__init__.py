"""What runs, in which order: command line, config tree, stages, run folder."""
