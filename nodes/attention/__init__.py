"""Nodes that let pictures of one batch look at each other while they are painted."""

from . import shared as shared
from . import subject as subject
from . import words as words
from .node import NODES as NODES
