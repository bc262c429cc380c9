"""Real tiny runs, killed and starved on purpose, compared with one that nothing happened to."""
