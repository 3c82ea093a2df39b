"""From text to image embedding: priors on the canvas."""

from . import embedding, files, pairs, sample, start, train

FOLDERS = (files.FOLDER, embedding.FOLDER)  # of ComfyUI's models folder
NODES = [*pairs.NODES, *start.NODES, *train.NODES, *files.NODES, *sample.NODES, *embedding.NODES]
