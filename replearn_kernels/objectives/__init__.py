"""The losses' mathematics: one file per family, found by name by the dispatcher's operators."""

from .softmax import Softmax

OBJECTIVES = {objective.name: objective for objective in (Softmax,)}
