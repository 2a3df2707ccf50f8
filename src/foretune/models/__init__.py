"""Loading models, finding their parts, and routing: which task owns which row of a batch."""
