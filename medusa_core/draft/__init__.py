"""What proposes tokens: draft heads, n-grams, and the trees their drafts are put in."""
