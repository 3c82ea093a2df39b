"""What the tests, the demo and the benches share: a real ComfyUI, in this process or as a server."""
