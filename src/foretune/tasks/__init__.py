"""Tasks, task collections, objectives and data sources."""
