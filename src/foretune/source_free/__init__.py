"""Source-free adaptation of time-series classifiers: subspace SFDA. A wing."""
