"""Loading models, finding their parts, and telling which task owns which row."""
