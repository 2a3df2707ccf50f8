"""Adaptability: which base adapts best to unseen tasks, and how sure that is."""
