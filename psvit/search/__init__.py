"""Search for a schedule and widths: a supernet of all candidates, then evolution."""

from .run import Search, Settings
from .space import Candidate, SearchSpace, default_space
from .supernet import Supernet
from .training import Data

__all__ = ["Candidate", "Data", "Search", "SearchSpace", "Settings", "Supernet", "default_space"]
