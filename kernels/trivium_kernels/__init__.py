"""Attention, norms, rotary embedding, activations and cache writes: one op per file, knowing nothing of any server.

Each op file holds the op's contract (a Protocol). `reference.py` implements all of them in plain torch; `dispatch.py`
picks the implementations for a device, once.
"""
