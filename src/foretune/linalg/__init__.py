"""Tensor maths that depends on no model."""
