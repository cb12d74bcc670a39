"""Many ratios, drawn, merged in memory, evaluated and compared."""

from m3jax.exploration.exploring import Exploration, explore
from m3jax.exploration.optimizing import Optimization, learn
from m3jax.exploration.pictures import check_picture, picture
from m3jax.exploration.resident import Resident, load_resident
from m3jax.exploration.scoring import Evaluation, Score
from m3jax.exploration.selection import Result

__all__ = [
    "Evaluation",
    "Exploration",
    "Optimization",
    "Resident",
    "Result",
    "Score",
    "check_picture",
    "explore",
    "learn",
    "load_resident",
    "picture",
]
