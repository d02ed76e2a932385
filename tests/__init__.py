"""Tests of memplan."""
