"""Decode steps without Python between the layers: captured once, replayed for every token (docs/runtime.md)."""
