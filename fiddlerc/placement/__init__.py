"""Which experts live on the accelerator: the memory it has for them, the choice, and the tables that follow."""

from .budget import count_memory
from .choice import place
from .prefetch import make_prefetch
from .tables import latencies, make_tables

__all__ = ["count_memory", "latencies", "make_prefetch", "make_tables", "place"]
