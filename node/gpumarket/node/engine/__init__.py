"""Engines: everything that turns token ids into vectors or tokens, each in a process of its own."""
