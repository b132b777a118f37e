"""Ray processes: rollout, reward and learner actors, weight publishing, deadlines."""
