"""Pruning mixtures of experts for a task: UNCURL, and its controls."""

PLAN_FILE = "experts.json"  # marks a folder as a pruned model
