"""Tests of the serving module."""
