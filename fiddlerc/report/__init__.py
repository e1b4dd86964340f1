"""The HTML report of a plan, and its figures as pictures."""

from .page import Inputs, plots, render

__all__ = ["Inputs", "plots", "render"]
