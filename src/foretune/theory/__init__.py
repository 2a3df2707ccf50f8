"""The synthetic experiments of the paper: a linear problem and a shallow network."""
