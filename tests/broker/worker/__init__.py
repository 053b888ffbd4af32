"""Tests of the worker: a real process, a real pipe, a real guest plane."""
