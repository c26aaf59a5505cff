"""Tests of the row stores."""
