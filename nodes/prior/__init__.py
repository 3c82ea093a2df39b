"""From text to image embedding: priors on the canvas."""

from . import embedding, files, pairs, sample, train

NODES = [*pairs.NODES, *train.NODES, *files.NODES, *sample.NODES, *embedding.NODES]
