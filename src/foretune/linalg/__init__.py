"""Tensor maths that knows no model."""
