"""Pruning mixtures of experts for a task: UNCURL, and its controls."""

PLAN_FILE, FORMAT = "experts.json", "foretune-experts-1"  # marks a folder as a pruned model
