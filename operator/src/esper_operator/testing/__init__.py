"""Doubles that are part of the product: an API server in memory."""
