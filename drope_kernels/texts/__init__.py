"""Texts that training and evaluation both read: sources, documents, windows of tokens."""
