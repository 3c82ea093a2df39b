"""Nodes that let pictures of one batch look at each other while they are painted."""

from .node import NODES as NODES
