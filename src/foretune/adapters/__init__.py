"""Stacked adapters, one per task: the bank, the maths of adapted layers, PEFT's format."""
