"""Draft heads behind one protocol."""
