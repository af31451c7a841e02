"""Demonstrations and queries with one, several or no images, of other sizes, so that rows are padded."""

from mmicl_kernels.data import Demonstration
from tests.support.example_images import BLUE, GREEN, RED

SHOTS = [
    Demonstration((RED,), "what?", "red"),
    Demonstration((BLUE, GREEN), "which?", "blue cat"),
    Demonstration((), "a b", "do"),
]
QUERIES = [
    Demonstration((BLUE,), "who is it?", "cat"),
    Demonstration((RED, GREEN), "say", "red blue"),
    Demonstration((), "why so?", "it"),
]
PLAIN = "{image}{text} {answer}\n"
