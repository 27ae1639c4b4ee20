"""Recordings of real programs: read them, and replay them into the software model."""
