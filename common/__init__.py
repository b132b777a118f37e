"""Error tree, strict configuration base, event log and atomic commits: what every other folder may use."""
