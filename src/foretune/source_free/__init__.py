"""Source-free adaptation of classifiers of time series: subspace SFDA. A wing."""
