"""What is known about several views of one object, and how it makes their pictures agree."""

from .node import NODES as NODES
