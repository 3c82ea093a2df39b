"""Nodes that give what a test wants to put in, events for every step, and no network."""

import socket

import pytest


@pytest.fixture
def given(monkeypatch):
    """`given("IMAGE", [a, b])` is a node that gives out these values as a list."""
    import nodes  # not before ComfyUI is there

    def given(kind: str, values: list) -> dict:
        class Given:
            RETURN_TYPES, OUTPUT_IS_LIST, FUNCTION, CATEGORY = (kind,), (True,), "give", "test"

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {}}

            def give(self):
                return (values,)

        name = f"Given{kind}{id(values)}"
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, Given)
        return {"class_type": name, "inputs": {}}

    return given


@pytest.fixture
def every_step(pack, monkeypatch):
    """An event for every step, however quick."""
    monkeypatch.setattr(pack.nodes.progress, "EVERY", -1.0)


@pytest.fixture
def no_network(monkeypatch):
    """Every try to reach another machine is an error, and is remembered."""
    tried = []

    def refuse(*address, **_):
        tried.append(address)
        raise ConnectionRefusedError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried
