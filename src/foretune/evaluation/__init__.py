"""Adaptability: which base adapts best to unseen tasks, and how certain the answer is."""
