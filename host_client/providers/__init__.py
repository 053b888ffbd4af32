"""Providers start and stop sandboxes; ``base`` holds the seam."""
