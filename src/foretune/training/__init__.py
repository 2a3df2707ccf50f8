"""The only loop, what it updates, what it leaves behind, and the verbs on top of it."""
