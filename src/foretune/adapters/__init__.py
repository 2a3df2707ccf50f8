"""One adapter for each of many tasks, stacked: the bank, its maths, PEFT's format."""
