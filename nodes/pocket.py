"""Pocket on the canvas: the little models, their world and their judge."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
