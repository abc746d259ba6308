"""Witnesses: who may go on when the two hosts lost each other."""
