"""How much memory a model takes: weights to the byte, cache, activations, training; and what fits."""

from whit.memory.needs import Fit, Need, Planner, Situation
from whit.memory.shapes import SHAPES, find_shape
from whit.memory.subject import Subject, find_subject

__all__ = ["SHAPES", "Fit", "Need", "Planner", "Situation", "Subject", "find_shape", "find_subject"]
