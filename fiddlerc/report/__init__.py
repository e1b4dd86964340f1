"""The HTML report of a plan."""

from .page import render

__all__ = ["render"]
