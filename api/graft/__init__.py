"""Graft's light half: the API, the tables, the job rules. It never imports torch, triton or transformers."""

__version__ = "0.1.0"
