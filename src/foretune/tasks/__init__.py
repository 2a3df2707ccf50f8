"""Tasks, collections, objectives and the places they come from."""
