"""Arithmetic modulo 11, solved step by step."""
