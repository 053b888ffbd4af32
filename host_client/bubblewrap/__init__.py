"""Sandboxes without a container engine: what ``providers/bubblewrap.py`` is made of; decision 015 says why it is so."""
