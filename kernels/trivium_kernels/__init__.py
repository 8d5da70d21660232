"""The operators of language models and of sampling: one op per file, knowing nothing of any server.

Each op file holds the op's contract (a Protocol) and the values that it takes. `reference` implements all of them in
plain torch, `cpu` many in C++, `gpu` in Triton; `dispatch.py` picks the implementations for a device, once.
"""
