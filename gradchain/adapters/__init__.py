"""Adapters: where chains meet torch."""
