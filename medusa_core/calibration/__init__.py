"""Measure how often draft heads are right, how sure they may be, and which tree is fastest here."""
