"""Pruning mixtures of experts: UNCURL, and its controls. A wing."""
